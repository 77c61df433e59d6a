"""ullm beside its peers: the same prompts, the same load generator, one server at a time, in rounds.

`candidates` are the servers and their commands, `scenarios` what is measured; `comparison_rounds` runs them
in an order that rotates; `hardware` measures the machine's limits; `comparison` and `comparison_plot` report.
"""
