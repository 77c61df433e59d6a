"""Running a model: the only package that imports torch.

One folder per concern: memory, sampling, attention, layers, loading, kernels, architectures, execution;
each imports only those before it. Only workers import this package, and only when they load a model.
"""
