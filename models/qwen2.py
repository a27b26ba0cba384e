"""Qwen 2 and 2.5: Llama with biases on query, key and value (`config.qkv_bias`), and in some
checkpoints a window in the layers from `max_window_layers` on (`config.windows`)."""

from octavo.models.llama import forward, tensors

__all__ = ["forward", "tensors"]
