"""Models: the native decoders, others through transformers, and the choice between them.

Imports every folder of the model but execution.
"""
