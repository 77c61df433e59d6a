"""The pure scheduling decisions: sequences, the block pool, batching, speculation and drafting.

No I/O, no clock, neither trio nor torch. Imports config, sampling and protocol.
"""
