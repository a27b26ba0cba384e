"""The text side of a model: tokenizer, chat template and sampling defaults, opened once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.engine.config import ConfigError, EngineConfig
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.text.generation import default_sampling_params
from octavo.engine.text.template import ChatTemplate, TemplateError, load_template
from octavo.engine.text.tokenizer import Tokenizer, load_tokenizer
from octavo.models.checkpoint import Checkpoint, CheckpointError, open_checkpoint

Message = Mapping[str, Any]


@dataclass(frozen=True)
class ModelText:
    """What is read of a checkpoint where text is handled; the weights are the engine's."""

    tokenizer: Tokenizer | None  # None: the model has none, and takes token ids only
    template: ChatTemplate | None
    no_template: str  # why `template` is None
    generation_config: dict[str, Any]

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the model wants. Raises ConfigError."""
        if self.tokenizer is None:
            raise ConfigError(self.no_template)
        return self.tokenizer.encode(text)

    def chat(self, messages: Sequence[Message], **variables: Any) -> tuple[str, list[int]]:
        """A conversation as text and as token ids. Raises TemplateError."""
        if self.template is None or self.tokenizer is None:
            raise TemplateError(self.no_template)
        text = self.template.render(messages, **variables)
        return text, self.tokenizer.encode(text, add_special_tokens=False)

    def defaults(self) -> SamplingParams:
        """What a request that asks for nothing gets."""
        return default_sampling_params(self.generation_config)


def open_text(config: EngineConfig, chat_template: str = "") -> ModelText:
    """Tokenizer, template and defaults of the config's model. Raises ConfigError."""
    try:
        checkpoint = open_checkpoint(
            config.model,
            load_format=config.load_format,
            revision=config.revision,
            offline=config.offline,
        )
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    defaults = {} if config.generation_config == "none" else dict(checkpoint.generation_config)
    source: Checkpoint | str = config.tokenizer or checkpoint
    try:
        tokenizer = load_tokenizer(source, revision=config.revision, offline=config.offline)
    except CheckpointError as error:
        if config.tokenizer:
            raise ConfigError(str(error)) from None
        return ModelText(None, None, str(error), defaults)
    finally:
        checkpoint.close()
    try:
        return ModelText(tokenizer, load_template(tokenizer, chat_template or None), "", defaults)
    except TemplateError as error:
        if chat_template:
            raise ConfigError(str(error)) from None
        return ModelText(tokenizer, None, str(error), defaults)
