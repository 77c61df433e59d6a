"""``ullm bench``: workloads, targets, statistics and reports for servers and engines.

A `workload` draws requests; a target (`server_target`, `engine_target`) runs one and records when each
piece of its answer arrived; `load` keeps a number of requests in flight; `stats` condenses the records;
`bench_report` writes them. Imports errors, config, sampling, engine and client.
"""
