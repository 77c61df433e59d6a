"""Grammars that constrain an answer: the values of a request, their compilation, and their errors."""
