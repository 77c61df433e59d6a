"""The HTTP surface: OpenAI's API, probes and metrics. It knows tokens and text, never tensors."""

from ullm.server.app import create_app
from ullm.server.http import bind, serve_http, urls

__all__ = ["bind", "create_app", "serve_http", "urls"]
