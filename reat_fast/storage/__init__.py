"""Files that are whole or not there, weights among them, and values from them as fields have."""
