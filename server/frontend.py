"""Frontend: from bodies to requests of the engine; all that needs the model's text is here."""

import asyncio
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from octavo.engine.config import EngineConfig
from octavo.engine.grammar.checker import Checker
from octavo.engine.grammar.vocabulary import Vocabulary
from octavo.engine.sampling_params import ParameterError, SamplingParams
from octavo.engine.text.generation import RequestLimits, make_request
from octavo.engine.text.opened import ModelText
from octavo.engine.text.template import TemplateError
from octavo.engine.text.tokenizer import Tokenizer
from octavo.server.calls import mentioned, plainly
from octavo.server.client import EngineClient, Generation
from octavo.server.metrics import Metrics
from octavo.server.observe import current
from octavo.server.pooling import Pooling
from octavo.server.protocol.chat import ChatCompletionRequest
from octavo.server.protocol.completions import CompletionRequest
from octavo.server.protocol.errors import ApiError, bad_request, unavailable
from octavo.server.protocol.pooling import ReadingRequest
from octavo.server.protocol.sampling import GenerationRequest
from octavo.server.protocol.structured import form_error
from octavo.server.settings import ServerSettings
from octavo.server.siblings import Siblings
from octavo.server.speech import Speech
from octavo.server.templates import RenderOrder, TemplateRoom

LONGEST_TIMEOUT = 864_000  # seconds
LONG_TEXT = 8192  # characters; beyond, a thread tokenizes, so that the streams of others go on
_ID = re.compile(r"[\w.:@/+=-]{1,128}", re.ASCII)
T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """What the model reads."""

    token_ids: list[int]
    text: str | None = None  # None: it came as token ids


@dataclass(frozen=True)
class RequestId:
    """The name of a request in its answer, in logs and in the X-Request-Id header."""

    public: str
    created: int  # seconds since 1970

    @classmethod
    def of(
        cls, request: Request, body: GenerationRequest | ReadingRequest, kind: str
    ) -> "RequestId":
        """`kind`-name, the name from the body, the X-Request-Id header or chance.

        A `kind` that ends with an underscore needs no dash.
        """
        header = request.headers.get("x-request-id", "")
        return cls._named(body, kind, header if _ID.fullmatch(header) else uuid.uuid4().hex)

    @classmethod
    def fresh(cls, body: GenerationRequest, kind: str) -> "RequestId":
        """The same without the header: for what can be asked for again by its name."""
        return cls._named(body, kind, uuid.uuid4().hex)

    @classmethod
    def _named(
        cls, body: GenerationRequest | ReadingRequest, kind: str, otherwise: str
    ) -> "RequestId":
        if body.request_id is not None and not _ID.fullmatch(body.request_id):
            raise bad_request(
                "`request_id` must be 1 to 128 letters, digits or any of . : @ / + = _ -",
                "request_id",
            )
        dash = "" if kind.endswith("_") else "-"
        return cls(f"{kind}{dash}{body.request_id or otherwise}", int(time.time()))


class Frontend:
    """Tokenizes and submits; one a process."""

    def __init__(
        self,
        settings: ServerSettings,
        config: EngineConfig,
        text: ModelText,
        client: EngineClient,
        folder: str | None = None,
    ) -> None:
        """`folder` is private, and shared by the API processes of one server."""
        self.settings, self.client, self.folder = settings, client, folder
        self.model, self.names = config.model, settings.names(config.model)
        self.max_logprobs = config.max_logprobs
        self.started = int(time.time())
        self.generation_config = text.generation_config
        self.chats = text.template is not None
        self.template_room = TemplateRoom(settings.chat_template_timeout)
        self.siblings = Siblings(
            client.figures,
            client.folder,
            client.number,
            settings.api_server_count,
            lambda: client.open_requests,
        )
        self.metrics = Metrics(
            self.names[0],
            stats=lambda: client.stats,
            ready=lambda: client.ready,
            snapshots=self.siblings.everybody,
            config=config,
        )
        self.pooling = Pooling(text, client, self._timeout)
        self.speech = Speech(
            settings.tool_call_parser,
            settings.reasoning_parser,
            text.template.source if text.template is not None else "",
        )
        self._text = text
        self.grammars = Checker(self._vocabulary, config.grammar_time_limit)

    @property
    def _tokenizer(self) -> Tokenizer:
        if self._text.tokenizer is None:
            raise bad_request(f"text cannot be read, send token ids: {self._text.no_template}")
        return self._text.tokenizer

    def _vocabulary(self) -> Vocabulary:
        ready = self.client.ready
        assert ready is not None, "nobody asks for a form before the engine is ready"
        return Vocabulary.of(self._text.tokenizer, ready.vocab_size, ready.eos_token_ids)

    def check_model(self, name: str | None) -> None:
        """ApiError 404 for a model that is not served here; no name means the only one."""
        if name is not None and name not in self.names:
            names = ", ".join(f"`{own}`" for own in self.names)
            raise ApiError(
                404, f"the model `{name}` does not exist: this server has {names}", "model"
            )

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids, without holding up others for a long text."""
        return await _away(
            len(text), lambda: self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        )

    def decode(self, token_ids: list[int]) -> str:
        """The text of token ids, special tokens included."""
        for token in token_ids:
            self._check_token(token, "tokens")
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def token_text(self, token: int) -> str:
        """What one token adds to a text."""
        return self._tokenizer.token_text(token)

    def token_strings(self, token_ids: list[int]) -> list[str]:
        """The vocabulary's own spelling of each token."""
        return [self._tokenizer.id_to_token(token) or "" for token in token_ids]

    def prompt_text(self, prompt: Prompt) -> str:
        """The prompt as text, for `echo`."""
        if prompt.text is not None:
            return prompt.text
        return self._tokenizer.decode(prompt.token_ids, skip_special_tokens=False)

    async def chat_prompt(self, body: ChatCompletionRequest) -> Prompt:
        """The conversation rendered with the model's template, and tokenized."""
        self._must_generate()
        template = self._text.template
        if template is None and body.chat_template is None:
            raise bad_request(self._text.no_template, "messages")
        messages, tools = self._conversation(body)
        variables = dict(body.chat_template_kwargs or {})
        if body.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", body.reasoning_effort)
        wants_answer = body.add_generation_prompt
        if wants_answer is None:
            wants_answer = not body.continue_final_message
        try:
            if body.chat_template is not None:
                variables |= {"documents": body.documents, "add_generation_prompt": wants_answer}
                variables["tools"] = tools
                variables["continue_final_message"] = bool(body.continue_final_message)
                text = await self._render_given(body.chat_template, messages, variables)
            else:
                assert template is not None
                text = await _away(
                    sum(len(message["content"]) for message in messages),
                    lambda: template.render(
                        messages,
                        tools=tools,
                        documents=body.documents,
                        add_generation_prompt=wants_answer,
                        continue_final_message=bool(body.continue_final_message),
                        **variables,
                    ),
                )
        except (TemplateError, TypeError) as error:
            raise bad_request(str(error), "messages") from None
        tokens = await self.encode(text, bool(body.add_special_tokens))
        return Prompt(self._truncated(tokens, body), text)

    def _conversation(
        self, body: ChatCompletionRequest
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """Messages, and the tools for the template; in a message where it knows no tools."""
        messages = body.conversation()
        tools = msgspec.to_builtins(body.tools) if body.uses_tools else None
        template = self.speech.template_has_tools
        if body.chat_template is not None:
            template = "tools" in body.chat_template
        if template:
            return messages, tools
        messages = [plainly(message) for message in messages]
        return (mentioned(messages, tools) if tools else messages), None

    @property
    def special_tokens(self) -> list[str]:
        """The special tokens that a chat template may write."""
        return list(self._tokenizer.special_tokens.values())

    async def _render_given(
        self, source: str, messages: list[dict[str, Any]], arguments: dict[str, Any]
    ) -> str:
        """With the template of the request, where the user lets requests bring one."""
        if not self.settings.trust_request_chat_template:
            raise bad_request(
                "`chat_template` in a request is not allowed by this server: leave it out, or "
                "start it with --trust-request-chat-template",
                "chat_template",
            )
        tokens = dict(self._tokenizer.special_tokens)
        return await self.template_room.render(RenderOrder(source, tokens, messages, arguments))

    async def completion_prompt(self, prompt: str | list[int], body: CompletionRequest) -> Prompt:
        """A prompt of /v1/completions, as token ids."""
        self._must_generate()
        if isinstance(prompt, list):
            for token in prompt:
                self._check_token(token, "prompt")
            return Prompt(self._truncated(prompt, body))
        add = True if body.add_special_tokens is None else body.add_special_tokens
        tokens = await self.encode(prompt, add)
        return Prompt(self._truncated(tokens, body), prompt)

    async def check_form(self, sampling: SamplingParams, field: str = "structured_outputs") -> None:
        """Compile the form that the text shall have, while others are served.

        Call it before `submit`, which otherwise compiles and holds up everybody. ApiError 400 for
        one that is wrong or too slow, in the words of `field`.
        """
        if sampling.structured_outputs is not None:
            try:
                await self.grammars.acheck(sampling.structured_outputs)
            except ParameterError as error:
                raise form_error(error, field) from None

    def submit(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        body: GenerationRequest,
        request_id: str,
        mask_after: Sequence[int] = (),
    ) -> Generation:
        """Send it to the engine. ApiError 400 names what cannot be served, 503 says to wait.

        The form of the text, where one is asked for, begins behind the tokens `mask_after`.
        """
        self.client.check_room()
        ready = self.client.ready
        assert ready is not None, "check_room lets nobody past before the engine is ready"
        handle = self.client.new_handle(sampling.n)
        try:
            request = make_request(
                handle=handle,
                request_id=f"{request_id}:{handle}",  # clients may use one name twice
                prompt_token_ids=prompt.token_ids,
                params=sampling,
                limits=RequestLimits(
                    max_model_len=ready.max_model_len,
                    vocab_size=ready.vocab_size,
                    eos_token_ids=tuple(ready.eos_token_ids),
                    max_logprobs=self.max_logprobs,
                ),
                tokenizer=self._text.tokenizer,
                priority=body.priority or 0,
                arrival=time.monotonic(),
                cache_salt=body.cache_salt or "",
                grammar=self.grammars.check,
                mask_after=mask_after,
                timeout=self._timeout(body),
            )
        except ParameterError as error:
            raise bad_request(str(error), error.parameter) from None
        generation = self.client.submit(request, prompt.token_ids)
        record = current()
        if record is not None:
            record.id = record.id or request_id
            record.generations.append(generation)
        return generation

    def _timeout(self, body: GenerationRequest | ReadingRequest) -> float:
        """Seconds that the request may take; 0 is no limit."""
        if body.timeout is None:
            return self.settings.request_timeout
        if not 0 < body.timeout <= LONGEST_TIMEOUT:
            raise bad_request(
                f"`timeout` must be above 0 and at most {LONGEST_TIMEOUT:,} seconds, "
                f"got {body.timeout:g}",
                "timeout",
            )
        return body.timeout

    def _must_generate(self) -> None:
        """ApiError 400 where the engine only reads."""
        ready = self.client.ready
        if ready is not None and ready.pooler is not None:
            gives = "embeddings" if ready.pooler.task == "embed" else "scores"
            path = "/v1/embeddings" if ready.pooler.task == "embed" else "/v1/score"
            raise bad_request(
                f"the model `{self.names[0]}` gives {gives} and generates no text: ask {path}, or "
                "serve a model that generates",
                "model",
            )

    def _truncated(self, token_ids: list[int], body: GenerationRequest) -> list[int]:
        """The last `truncate_prompt_tokens`; -1 is as many as the context takes."""
        keep = body.truncate_prompt_tokens
        if keep is None:
            return token_ids
        if keep == -1 and self.client.ready is not None:
            keep = self.client.ready.max_model_len - 1
        if keep < 1:
            raise bad_request(
                f"`truncate_prompt_tokens` must be at least 1, or -1, got {keep}",
                "truncate_prompt_tokens",
            )
        return token_ids[-keep:]

    def _check_token(self, token: int, field: str) -> None:
        ready = self.client.ready
        if ready is None:  # only it knows the vocabulary
            raise unavailable("the engine is still starting", retry_after=1)
        size = ready.vocab_size
        if not 0 <= token < size:
            raise bad_request(
                f"`{field}` has the token {token}; ids are from 0 to {size - 1}", field
            )


async def _away(size: int, work: Callable[[], T]) -> T:
    """Small work at once, large work in a thread."""
    return work() if size <= LONG_TEXT else await asyncio.to_thread(work)
