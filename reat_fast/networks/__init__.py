"""The architectures, and the form of them that an attack sees."""
