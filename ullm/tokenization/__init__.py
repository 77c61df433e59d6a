"""Between text and tokens: chat templates, token texts, and incremental detokenization.

Plain functions and values, used by the tokenizer actor and by the readers of a request. Imports errors only.
"""
