"""The handlers of every route, one module per surface.

Imports http, api and the engine.
"""
