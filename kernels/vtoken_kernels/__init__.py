"""Triton kernels of vtoken. None yet: the plain torch paths of `vtoken.ops` serve every device."""
