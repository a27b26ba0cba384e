"""Tokens and text: tokenizer, chat template, incremental detokenizer. Never imports jax."""
