"""A small HTTP client for OpenAI-compatible servers, used by ``ullm chat --url`` and the measuring tools.

Imports errors only.
"""
