"""Checkpoints whose weights are codes: one module per format, and the choice between them."""
