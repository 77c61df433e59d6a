"""Kernels for CPUs in C++, compiled on the machine that they run on, if it has a compiler."""
