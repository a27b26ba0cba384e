"""One turn of a conversation: asked with a chat body, heard as deltas or whole.

Every route that speaks of messages (chat completions, responses, Anthropic's messages) becomes a
ChatCompletionRequest, begins a Turn, and only differs in how it writes down what the Turn says.
"""

from collections.abc import AsyncIterator

from octavo.server.client import Generation
from octavo.server.collect import Delta, deltas, merge
from octavo.server.frontend import Frontend, Prompt
from octavo.server.protocol.chat import ChatCompletionRequest
from octavo.server.protocol.sampling import check_logprobs


class Turn:
    """What the model says to one chat body. `cancel` it when done, however it ended."""

    def __init__(self, body: ChatCompletionRequest, prompt: Prompt, generation: Generation) -> None:
        self.body, self.prompt = body, prompt
        self._generation = generation

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """What is new for each choice, as it comes: content in `text`."""
        async for batch in deltas([self._generation]):
            yield batch

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
    await frontend.check_form(sampling, body.form_field)
    return Turn(body, prompt, frontend.submit(prompt, sampling, body, request_id))
