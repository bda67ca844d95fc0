"""One op per file: maths, PyTorch form, Triton kernel, launcher, autograd."""
