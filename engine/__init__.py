"""The engine: state, pages, plan, step, scheduler and the run loop.

This package imports nothing by itself: `engine.messages`, `engine.config`, `engine.sampling_params`
and `engine.text` are used by processes that must never import jax.
"""
