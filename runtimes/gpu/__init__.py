"""Kernels compiled ahead of time, on a host that has neither torch nor triton: read, loaded and launched."""
