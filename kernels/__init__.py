"""Triton kernels of mfp, imported as ``mfp.kernels``."""
