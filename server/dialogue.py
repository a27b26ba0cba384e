"""One turn of a conversation: asked with a chat body, heard as deltas or whole.

Every route that speaks of messages (chat completions, responses, Anthropic's messages) becomes a
ChatCompletionRequest, begins a Turn, and only differs in how it writes down what the Turn says.
"""

from collections.abc import AsyncIterator, Callable

from octavo.server.client import Generation
from octavo.server.collect import Delta, deltas, merge
from octavo.server.frontend import Frontend, Prompt
from octavo.server.parsers.choice import Choice
from octavo.server.protocol.chat import ChatCompletionRequest
from octavo.server.protocol.sampling import check_logprobs


class Turn:
    """What the model says to one chat body. `cancel` it when done, however it ended."""

    def __init__(
        self,
        body: ChatCompletionRequest,
        prompt: Prompt,
        generation: Generation,
        reader: Callable[[], Choice] | None = None,
    ) -> None:
        """`reader` makes what finds thoughts and calls in a choice; None: all is the answer."""
        self.body, self.prompt = body, prompt
        self._generation, self._reader = generation, reader
        self._choices: dict[int, Choice] = {}
        self._echoed: set[int] = set()
        self._echo = _echo(body)

    @property
    def reasoning_tokens(self) -> int | None:
        """Tokens of thoughts so far, of all choices; None where nobody looks for thoughts."""
        if self._reader is None:
            return None
        return sum(choice.reasoning_tokens for choice in self._choices.values())

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """What is new for each choice, as it comes: content in `text`, thoughts and calls apart."""
        async for batch in deltas([self._generation]):
            if self._reader is not None:
                for delta in batch:
                    self._read(delta)
            if self._echo:
                for delta in batch:
                    if delta.index not in self._echoed:
                        self._echoed.add(delta.index)
                        delta.text = self._echo + delta.text
            yield batch

    def _read(self, delta: Delta) -> None:
        choice = self._choices.get(delta.index)
        if choice is None:
            assert self._reader is not None
            choice = self._choices[delta.index] = self._reader()
        choice.rewrite(delta)
        if self.body.include_reasoning is False:
            delta.reasoning = ""

    async def whole(self) -> list[Delta]:
        """Every choice with all that it said, in order."""
        choices: dict[int, Delta] = {}
        async for batch in self.deltas():
            merge(choices, batch)
        return [choices[index] for index in sorted(choices)]

    def cancel(self) -> None:
        """Nobody wants the rest; does nothing once all has ended."""
        self._generation.cancel()


async def begin(frontend: Frontend, body: ChatCompletionRequest, request_id: str) -> Turn:
    """Check, render and submit. ApiError 400 names what cannot be served, 503 says to wait."""
    frontend.check_model(body.model)
    body.check()
    check_logprobs("top_logprobs", body.top_logprobs, frontend.max_logprobs)
    await frontend.client.until_ready()
    prompt = await frontend.chat_prompt(body)
    sampling = body.sampling(
        frontend.generation_config,
        max_tokens=body.most_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    speech, text = frontend.speech, prompt.text or ""
    sampling = speech.shaped(sampling, body)
    await frontend.check_form(sampling, "tools" if body.must_call else body.form_field)
    mark = speech.mask_after(sampling, text)
    mask_after = await frontend.encode(mark, False) if mark else []
    reader = speech.reader(body, text, frontend.special_tokens)
    generation = frontend.submit(prompt, sampling, body, request_id, mask_after)
    return Turn(body, prompt, generation, reader)


def _echo(body: ChatCompletionRequest) -> str:
    """The text that `echo` puts in front: an assistant's last message, which the answer goes on."""
    last = body.conversation()[-1] if body.echo else {}
    return str(last.get("content", "")) if last.get("role") == "assistant" else ""
