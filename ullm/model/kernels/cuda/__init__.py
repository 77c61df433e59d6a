"""What lies between the matrix products of a decoder layer on CUDA, fused into a few Triton kernels."""
