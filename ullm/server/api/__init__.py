"""The API's values: request schemas, response bodies, error bodies, log probability formats.

Imports errors, sampling, protocol and the engine's status values.
"""
