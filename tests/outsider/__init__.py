"""A project of somebody else's: its own settings, the wheel in an environment of its own, other plugins."""
