"""Models, their weights, KV cache and sampling: the only part of ullm that imports torch."""
