"""Paged attention: a step's batch, and the PyTorch backends that attend over the KV pool.

Imports memory and sampling.
"""
