"""The ASGI application for ``hypercorn ullm.app:app``; see `ullm.hosting.asgi`."""

from ullm.hosting.asgi import App, app, open_from_env

__all__ = ["App", "app", "open_from_env"]
