"""Costs that must not grow: a server under a mix of requests for a long time, sampled and judged.

`mix` draws the requests, `sample` measures the server, `judge` decides what counts as growth; `soak_run` is
the run itself, `soak_report` and `soak_plot` show it.
"""
