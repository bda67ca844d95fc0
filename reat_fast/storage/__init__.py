"""Files that are whole or not there at all, and values from them as the types fields have."""
