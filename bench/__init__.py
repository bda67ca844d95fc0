"""Timings, and what the compiler makes of the kernels."""
