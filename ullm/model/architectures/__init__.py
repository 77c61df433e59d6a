"""Models: the native decoders, any other one through transformers, and the choice among them.

Imports every folder of the model but execution.
"""
