"""Decoding and prefill without a server: ullm beside OpenVINO GenAI and llama.cpp, or its own options.

`offline_load` is the load of both. `offline_command` runs the peers on the same GGUF file; `defaults_command`
runs ullm with other options than its defaults, `variants` says which, and `defaults_report` judges them. The
rounds are those of `tests.benchmarks.batch`.
"""
