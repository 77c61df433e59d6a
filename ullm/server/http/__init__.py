"""HTTP over Hypercorn and Quart: listening sockets, connections with limits, server-sent events.

Knows no routes and no engine. Imports errors, logs, and the error bodies of `api`.
"""
