"""The command line: one module per command, imported when the command runs.

The top layer: may import everything but entrypoints.
"""
