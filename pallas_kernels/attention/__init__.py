"""Ragged paged attention: the definition, and one file per platform."""
