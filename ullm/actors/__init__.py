"""The engine's actors: router, scheduler, tokenizer, worker group and standby pool.

They carry out what `ullm.scheduling` decides and talk to workers in `ullm.protocol` through a transport.
Imports supervision, scheduling, tokenization, protocol, faults, hub, worker and what is below them.
"""
