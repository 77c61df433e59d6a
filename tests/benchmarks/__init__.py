"""The maintainers' benchmarks: ``python -m tests.benchmarks NAME …``, run from the checkout's root.

`compare` measures ullm beside its peers over HTTP, `batch` and `offline` without a server, `defaults` beside
its own options, `disturbance` beside busy neighbours and under quotas, `soak` for a long time; `events`,
`pauses` and `startup` show what clients see of failures, stops and starts; `front_end` measures the HTTP
server alone. Programs in `scripts` run in the peers' own Pythons. Users have ``ullm bench`` and
``ullm chaos``.
"""
