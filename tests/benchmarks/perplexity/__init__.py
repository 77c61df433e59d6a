"""What the formats of GGUF, and ullm's kernels for them, cost a model in perplexity."""
