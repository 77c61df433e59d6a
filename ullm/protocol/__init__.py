"""What engine and worker say to each other: messages, their frames on a pipe, and the runner interface.

Imports only errors, config and sampling, so that both sides can import it.
"""
