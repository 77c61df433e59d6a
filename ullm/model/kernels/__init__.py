"""ullm's own kernels: C++ for CPUs (`cpu`), Triton for CUDA (`cuda`), both behind PyTorch interfaces.

Imports layers, attention, sampling and memory.
"""
