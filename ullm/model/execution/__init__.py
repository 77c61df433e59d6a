"""Running one rank: loading, steps, sequences, CUDA graphs, sleep, and preparing a standby worker.

The top folder of the model; implements `ullm.protocol.runner.Runner`.
"""
