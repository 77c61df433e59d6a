"""Memory of a rank: the KV pool, the device's memory, and transfers between host and device.

The lowest folder of the model: imports config, errors, logs and machine.
"""
