"""One op per file: maths, PyTorch form, launcher, autograd and, where it pays, a Triton kernel."""
