"""vLLM's package for its OpenAI-compatible server; `api_server` runs ``ullm serve``."""
