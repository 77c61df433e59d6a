"""Measuring servers and engines: workloads, targets, statistics, reports.

A `workload` says what to ask; a target (`http`, `engine`) runs one request and records when each
piece of its answer came; `load` keeps a number of requests in flight; `stats` condenses the records;
`report` writes them down. Whatever is measured, the same code measures it.
"""
