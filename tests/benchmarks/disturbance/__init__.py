"""ullm beside its peers with less than the whole machine: busy neighbours, quotas, few cores, many threads.

`disturbances` says what is done to a server, with the help of `neighbours` and `control_group`;
`disturbance_load` measures a server meanwhile; `disturbance_rounds` gives each server its turn under each
disturbance; `disturbance_report` judges. Servers and their start are those of `tests.benchmarks.compare`.
"""
