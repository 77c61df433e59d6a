"""One rank at work: loading, steps, sequences, CUDA graphs, sleep, and preparing as a standby worker.

The top folder of the model; implements `ullm.protocol.runner.Runner`.
"""
