"""From logits to tokens: filters, penalties, the seeded choice of a token, and log probabilities.

Imports memory, protocol and the sampling parameters.
"""
