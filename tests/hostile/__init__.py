"""Costly and malformed requests, as data, and what a server does with them while others are served."""
