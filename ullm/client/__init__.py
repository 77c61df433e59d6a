"""A small HTTP client for OpenAI-compatible servers: what ``ullm chat --url``, bench and chaos share.

Imports errors only.
"""
