"""The engine's actors: router, scheduler, tokenizer, worker group and standby pool.

They carry out the decisions of `ullm.scheduling`, and exchange messages of `ullm.protocol` with workers.
Imports supervision, scheduling, tokenization, protocol, faults, hub, worker and what is below them.
"""
