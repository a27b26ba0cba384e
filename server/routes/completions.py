"""POST /v1/completions: one prompt or many, each with its choices."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response

from octavo.engine.sampling_params import SamplingParams
from octavo.server.chunks import Chunks
from octavo.server.client import Generation
from octavo.server.collect import Delta, collect, deltas
from octavo.server.frontend import Frontend, Prompt, RequestId
from octavo.server.logprobs import completion_logprobs, prompt_logprobs
from octavo.server.protocol.completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
)
from octavo.server.protocol.sampling import Usage, check_logprobs, usage_of
from octavo.server.respond import frontend_of, json_response, read_body
from octavo.server.streaming import EventStream, while_connected

DEFAULT_MAX_TOKENS = 16


@dataclass
class Job:
    """One request body on its way: what was asked, and how far its choices are."""

    body: CompletionRequest
    frontend: Frontend
    name: RequestId
    prompts: list[Prompt]
    sampling: SamplingParams
    drop: bool  # `max_tokens` 0 with `echo`: one token is made and not shown
    offsets: dict[tuple[int, int], int] = field(default_factory=dict)  # characters already sent
    generated: int = 0
    cached: dict[int, int] = field(default_factory=dict)

    @property
    def model(self) -> str:
        return self.body.model or self.frontend.names[0]

    def index(self, delta: Delta) -> int:
        return delta.prompt * self.sampling.n + delta.index

    def usage(self) -> Usage:
        asked = sum(len(prompt.token_ids) for prompt in self.prompts)
        return usage_of(asked, self.generated, sum(self.cached.values()))


async def create(request: Request) -> Response:
    frontend = frontend_of(request)
    body = await read_body(request, CompletionRequest)
    frontend.check_model(body.model)
    body.check()
    wanted = int(body.logprobs) if body.logprobs is not None else None
    check_logprobs("logprobs", wanted, frontend.max_logprobs)
    await frontend.client.until_ready()
    name = RequestId.of(request, body, "cmpl")
    prompts = [await frontend.completion_prompt(prompt, body) for prompt in body.prompts()]
    job = Job(body, frontend, name, prompts, _sampling(body, frontend), body.max_tokens == 0)
    await frontend.check_form(job.sampling, body.form_field)
    generations: list[Generation] = []

    def cancel() -> None:
        for generation in generations:
            generation.cancel()

    try:
        for i, prompt in enumerate(prompts):
            generations.append(frontend.submit(prompt, job.sampling, body, f"{name.public}-{i}"))
        if body.stream:
            return EventStream(_stream(job, generations), cancel, name.public)
        whole = await while_connected(request, collect(generations))
    except BaseException:
        cancel()
        raise
    return json_response(_whole(job, whole), request_id=name.public)


def _sampling(body: CompletionRequest, frontend: Frontend) -> SamplingParams:
    wanted = int(body.logprobs) if body.logprobs is not None else None
    values = {"logprobs": wanted}
    if body.echo and wanted is not None and body.prompt_logprobs is None:
        values["prompt_logprobs"] = wanted
    most = 1 if body.max_tokens == 0 else body.max_tokens
    if most is not None or "max_new_tokens" not in frontend.generation_config:
        values["max_tokens"] = DEFAULT_MAX_TOKENS if most is None else most
    return body.sampling(frontend.generation_config, **values)


def _take(job: Job, delta: Delta) -> CompletionLogprobs | None:
    """Count a delta, put an echoed prompt before it, and give its log probabilities."""
    body, prompt = job.body, job.prompts[delta.prompt]
    if job.drop:
        delta.text, delta.token_ids, delta.logprobs = "", [], []
        delta.finish_reason = delta.finish_reason and "length"
    job.generated += len(delta.token_ids)
    if delta.cached_tokens:
        job.cached[delta.prompt] = delta.cached_tokens
    key = (delta.prompt, delta.index)
    offset = job.offsets.get(key)
    first = offset is None
    offset = offset or 0
    tokens, rows = delta.token_ids, delta.logprobs
    if first and body.echo:
        delta.text = job.frontend.prompt_text(prompt) + delta.text
        if body.logprobs is not None and delta.prompt_logprobs:
            tokens, rows = [*prompt.token_ids, *tokens], [*delta.prompt_logprobs, *rows]
    job.offsets[key] = offset + len(delta.text)
    named = bool(body.logprob_token_ids)
    if (body.logprobs is None and not named) or not rows:
        return None
    as_ids = bool(body.return_tokens_as_token_ids)
    text_of = job.frontend.token_text
    return completion_logprobs(
        tokens, rows, -1 if named else int(body.logprobs or 0), offset, as_ids, text_of
    )


def _whole(job: Job, whole: list[list[Delta]]) -> CompletionResponse:
    choices = []
    for prompt, results in zip(job.prompts, whole, strict=True):
        for delta in results:
            logprobs = _take(job, delta)
            shown = delta.prompt_logprobs if job.body.prompt_logprobs is not None else None
            ids = job.body.return_token_ids
            choices.append(
                CompletionChoice(
                    index=job.index(delta),
                    text=delta.text,
                    logprobs=logprobs,
                    finish_reason=delta.finish_reason,
                    stop_reason=delta.stop_reason,
                    token_ids=delta.token_ids if ids else None,
                    prompt_token_ids=prompt.token_ids if ids else None,
                    prompt_logprobs=prompt_logprobs(shown),
                )
            )
    return CompletionResponse(
        id=job.name.public,
        created=job.name.created,
        model=job.model,
        choices=choices,
        usage=job.usage(),
    )


async def _stream(job: Job, generations: list[Generation]) -> AsyncIterator[bytes]:
    body = job.body
    chunks = Chunks("text_completion", job.name.public, job.name.created, job.model)
    async for batch in deltas(generations):
        frames = []
        for delta in batch:
            first = (delta.prompt, delta.index) not in job.offsets
            logprobs = _take(job, delta)
            token_ids = delta.token_ids if body.return_token_ids else None
            prompt_ids = job.prompts[delta.prompt].token_ids if token_ids and first else None
            usage = job.usage() if body.continuous_usage else None
            if delta.text or delta.finish or logprobs or token_ids:
                frames.append(
                    chunks.text(
                        job.index(delta),
                        delta.text,
                        delta.finish,
                        logprobs,
                        token_ids,
                        usage,
                        prompt_ids,
                    )
                )
        if frames:
            yield b"".join(frames)
    if body.include_usage:
        yield chunks.usage(job.usage())
