"""/v1/completions: bodies in and out."""

import msgspec

from octavo.server.protocol.errors import bad_request, not_yet
from octavo.server.protocol.sampling import GenerationRequest, Usage

MAX_PROMPTS = 1024


class CompletionRequest(GenerationRequest, kw_only=True):
    prompt: str | list[str | int | list[int]] | None = None
    logprobs: int | bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    def check(self) -> None:
        super().check()
        if self.suffix:
            raise not_yet("suffix", "put what comes after the gap into the prompt")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise not_yet("best_of", "use `n` and choose yourself")
        if self.max_tokens == 0 and not self.echo:
            raise bad_request("`max_tokens` must be at least 1 without `echo`, got 0", "max_tokens")
        self.prompts()

    def prompts(self) -> list[str | list[int]]:
        """One prompt for each list of choices, as text or as token ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise bad_request("`prompt` is required and must not be empty", "prompt")
        if all(isinstance(item, int) for item in prompt):
            return [[item for item in prompt if isinstance(item, int)]]
        prompts = [item for item in prompt if isinstance(item, str | list)]
        if len(prompts) != len(prompt):
            raise bad_request("`prompt` mixes token ids with whole prompts", "prompt")
        if len(prompts) > MAX_PROMPTS:
            raise bad_request(
                f"`prompt` takes at most {MAX_PROMPTS} prompts, got {len(prompts)}", "prompt"
            )
        return prompts


class CompletionLogprobs(msgspec.Struct):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(msgspec.Struct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_logprobs: list[dict[int, dict[str, float | int | str | None]] | None] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionResponse(msgspec.Struct, kw_only=True):
    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None
