"""ullm beside its peers: the same prompts, the same load generator, one server at a time, in rounds.

`candidates` says how each is started; `scenarios` what is measured of a running one; `run` does the rounds,
their order rotating; `machine` measures what the hardware allows; `report` and `plot` write it down.
"""
