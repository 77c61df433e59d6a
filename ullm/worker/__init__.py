"""What runs in a worker, whether process or thread: its loop, its entry point and its injected misbehavior.

The model arrives as a runner named by the engine. Imports protocol, errors, logs and machine.
"""
