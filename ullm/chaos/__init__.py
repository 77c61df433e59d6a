"""Seeded chaos against a live server: random faults under load, then a check that nothing was lost.

`catalogue` says what is asked; `client` asks it, politely or not, and notes all that comes; `world` is
what faults act on; `signals`, `clients`, `operations` and `plans` are the faults; `verify` judges the end;
`run` puts them together; `report` writes it down. Everything is done from outside: by HTTP and signals.
"""
