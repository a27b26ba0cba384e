"""Octavo serves large language models in JAX, on TPU, NVIDIA GPU, AWS Neuron and CPU."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.engine.async_llm import AsyncLLM
    from octavo.engine.config import EngineConfig
    from octavo.engine.llm import LLM
    from octavo.engine.sampling_params import SamplingParams, StructuredOutputsParams
    from octavo.engine.text.outputs import CompletionOutput, RequestOutput

__version__ = "0.1.0"

# Public names are looked up when first used, so that a process which only needs SamplingParams
# never imports jax.
_HOMES = {
    "AsyncLLM": "octavo.engine.async_llm",
    "CompletionOutput": "octavo.engine.text.outputs",
    "EngineConfig": "octavo.engine.config",
    "LLM": "octavo.engine.llm",
    "RequestOutput": "octavo.engine.text.outputs",
    "SamplingParams": "octavo.engine.sampling_params",
    "StructuredOutputsParams": "octavo.engine.sampling_params",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineConfig",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'octavo' has no attribute '{name}'")
