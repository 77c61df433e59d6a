"""Sampling: penalties, filters, the seeded choice of a token from logits, and log probabilities.

Imports memory, protocol and the sampling parameters.
"""
