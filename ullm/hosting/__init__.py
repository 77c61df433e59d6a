"""Ways to run an engine inside other programs: ASGI servers, asyncio, threads.

Imports server, engine and what is below them.
"""
