"""``python -m tests.benchmarks simulate``: a whole engine with many replicas, on a virtual clock."""
