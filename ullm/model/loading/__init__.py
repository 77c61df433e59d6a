"""Reading checkpoints: configuration, safetensors, GGUF, and weights packed for the kernels.

Imports layers and the hub's cache.
"""
