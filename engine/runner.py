"""Which of two engines serves a model: one that generates, or one that reads texts (pooling)."""

from contextlib import closing

from octavo.engine.config import ConfigError, EngineConfig
from octavo.models.checkpoint import CheckpointError, open_checkpoint
from octavo.models.config import ModelConfig, ModelConfigError
from octavo.models.sources.sentence import is_sentence_model

GENERATES = "octavo.engine.core:EngineCore"
READS = "octavo.engine.encoder:EncoderCore"


def choose_runner(config: EngineConfig) -> str:
    """`generate` or `pooling`: what the user says, else what the model was made for.

    Raises ConfigError where the model cannot do what is asked.
    """
    if config.runner == "pooling":
        return config.runner
    try:
        checkpoint = open_checkpoint(
            config.model,
            revision=config.revision,
            offline=config.offline,
            load_format=config.load_format,
        )
        with closing(checkpoint):
            facts = ModelConfig.from_hf(checkpoint.config)
            made_to_read = not facts.generates or is_sentence_model(checkpoint)
    except (CheckpointError, ModelConfigError) as error:
        raise ConfigError(str(error)) from None
    if config.runner == "generate" and not facts.generates:
        raise ConfigError(
            f"`runner` is generate, but {facts.architecture} only reads: it has no head that says "
            "what comes next",
            "--runner pooling serves its embeddings or scores",
        )
    return "pooling" if config.runner == "auto" and made_to_read else "generate"


def core_of(config: EngineConfig) -> str:
    """The engine for a config, as module:class."""
    return READS if choose_runner(config) == "pooling" else GENERATES
