"""The offline benchmark that engines publish: many requests at once, and how soon all of them are done.

`load` says what is asked, `shapes` writes a model of a known shape with random weights, `engines` who takes
part, `run` does the rounds, each engine in a process of its own (`scripts.offline_batch`), and
`report` sets what they did against the roofline.
"""
