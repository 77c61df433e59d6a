"""Reading what a model writes: its reasoning, its calls of tools, and the rest, as the text comes."""
