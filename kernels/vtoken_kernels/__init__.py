"""Triton kernels of `vtoken.ops`: `vtoken_kernels.library` is what it calls. No GPU has run them yet."""
