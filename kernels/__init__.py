"""The step as Triton kernels."""
