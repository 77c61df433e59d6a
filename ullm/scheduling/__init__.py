"""The pure decisions: which sequences compute what, in which blocks, on which replica, and with which drafts.

Plain values only: no I/O, no clock, neither trio nor torch; `ullm.actors` carries the decisions out.
Imports errors, config, sampling and protocol.
"""
