"""Triton kernels for CUDA: a decoder layer's fused operations, decode attention, and the choice of tokens."""
