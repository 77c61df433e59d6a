"""Paged attention: the batch that a step computes, and the PyTorch backends that attend over the KV pool.

Imports memory and sampling.
"""
