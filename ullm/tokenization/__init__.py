"""Between text and tokens: chat templates, the bytes of tokens, and the incremental detokenizer.

Plain functions and values, used by the tokenizer actor and by the readers of a request. Imports errors only.
"""
