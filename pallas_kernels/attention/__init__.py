"""Ragged paged attention: the definition (reference.py), and one file per platform."""

from octavo.pallas_kernels.attention.batch import RaggedBatch
from octavo.pallas_kernels.attention.reference import KV, init_kv

__all__ = ["KV", "RaggedBatch", "init_kv"]
