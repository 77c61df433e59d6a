"""Kernels of ullm's own: C++ for CPUs (`cpu`), Triton for CUDA (`cuda`), each behind a PyTorch interface.

Imports layers, attention, sampling and memory.
"""
