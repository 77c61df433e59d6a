"""Hosts: processes that run an engine, whether `ullm serve`, an ASGI server, or a program on another loop.

Imports server, engine and what is below them; `bridge` imports only errors.
"""
