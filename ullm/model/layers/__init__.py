"""Building blocks of a decoder: sharded linear layers, quantization, rotary embeddings, collectives.

Imports attention, sampling and the folders below them.
"""
