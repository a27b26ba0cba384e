"""Structured output: from what a request asks for to the tokens that it may sample next. No jax.

source.py      the request's parameters as one grammar text of llguidance
tags.py        the same for structural tags
vocabulary.py  what a grammar must know of the model's tokens
checker.py     in an API process: compiles the text in a helper process, within a time limit
helper.py      that helper process
compiler.py    in the engine: compiles the checked text again, beside the running batch
guide.py       where one sequence is in its grammar, and the masks of many at once
"""
