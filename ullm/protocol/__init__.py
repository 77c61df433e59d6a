"""What engine and worker agree on: messages, their frames on a pipe, and the runner interface.

Imports only errors, config and sampling, so that both sides can import it.
"""
