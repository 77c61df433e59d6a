"""Costs that must not grow: a server under a mix of requests for a long time, sampled and judged.

`mix` says what is asked, `sample` what is looked at, `judge` what counts as growth; `run` is the run itself,
`report` and `plot` show it.
"""
