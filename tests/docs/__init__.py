"""Tables and pages of the documentation that are made from the code; ``python -m tests.docs`` writes them.

A page keeps its prose and marks where a table goes, between ``<!-- made: NAME -->`` and ``<!-- end -->``.
`pages` finds and fills those places; the other modules make the tables, one per concern.
"""
