"""The architectures, the folded form that an attack sees, the fused form of an update."""
