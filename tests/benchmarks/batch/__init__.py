"""The offline benchmark that engines publish: the time until many requests, submitted at once, are done.

`batch_load` draws the requests, `shapes` writes a model of a known shape with random weights, `contenders`
are the engines, `batch_rounds` runs each in a process of its own (`scripts.offline_batch`), and
`batch_report` compares the results with the roofline.
"""
