"""Decisions on plain values: no I/O, no clocks, neither trio nor torch."""
