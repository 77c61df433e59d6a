"""The code of a worker, whether process or thread: its loop, its entry point, and the faults it carries out.

The model is a runner that the engine names. Imports protocol, errors, logs and machine.
"""
