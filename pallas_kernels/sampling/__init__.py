"""Sampling: from logits to tokens, by thresholds and never by a sort."""
