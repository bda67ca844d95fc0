"""Files that are whole or not there, weights among them, and typed values read from them."""
