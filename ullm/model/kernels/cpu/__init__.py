"""Kernels for CPUs, compiled on the machine they run on where it has a C++ compiler."""
