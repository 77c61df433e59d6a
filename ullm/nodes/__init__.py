"""Other hosts: agents that run an engine's workers there, and their connections to the engine."""
