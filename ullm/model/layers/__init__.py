"""Building blocks of a decoder: sharded linear layers, quantization, rotary embeddings, ranks.

Imports attention, sampling and what is below them.
"""
