"""How the served model speaks: which marks its thoughts and calls have, and who reads them."""

from collections.abc import Callable, Iterable

from octavo.engine.sampling_params import SamplingParams
from octavo.server.calls import forced_form
from octavo.server.parsers.bare import PYTHON_TAG, TOOL_CALLS
from octavo.server.parsers.choice import Choice
from octavo.server.parsers.events import Parser, Plain
from octavo.server.parsers.forced import Named, Required
from octavo.server.parsers.harmony import Harmony
from octavo.server.parsers.reasoning import CLOSE, leaves_open
from octavo.server.parsers.registry import (
    AUTO,
    TOOL_FORMATS,
    long_id,
    reasoning_format,
    thinking,
    tool_format,
)
from octavo.server.parsers.strip import Strip
from octavo.server.protocol.chat import ChatCompletionRequest
from octavo.server.protocol.errors import bad_request
from octavo.server.protocol.tools import chosen

HARMONY_END = "<|end|>"
HARMONY_FINAL = "<|channel|>final<|message|>"


class Speech:
    """Fixed for a server; makes what reads the choices of one request."""

    def __init__(self, tools: str, reasoning: str, template: str) -> None:
        """`tools` and `reasoning` are the two flags; `template` is the model's chat template."""
        # Without either, a model that does not open its thoughts may not think at all.
        self._thinks = reasoning != AUTO or "enable_thinking" in template
        self.template_has_tools = "tools" in template
        self.tools = tool_format(tools, template)
        self.reasoning = reasoning_format(reasoning, template)

    def special(self, body: ChatCompletionRequest) -> bool:
        """Marks that the request needs are special tokens."""
        if self.reasoning == "openai_gptoss":
            return True
        auto = body.uses_tools and not body.must_call
        return auto and bool(self.tools) and TOOL_FORMATS[self.tools].special

    def shaped(self, sampling: SamplingParams, body: ChatCompletionRequest) -> SamplingParams:
        """With the grammar of calls that must be made, and with the tokens that parsers need."""
        if body.must_call:
            name = chosen(body.tool_choice, body.tools or [])
            form = forced_form(body.tools or [], name, body.parallel_tool_calls is not False)
            sampling = sampling.replace(structured_outputs=form)
        if self.special(body):
            sampling = sampling.replace(skip_special_tokens=False)
        return sampling

    def mask_after(self, sampling: SamplingParams, prompt: str) -> str:
        """The text behind which a grammar begins: a model thinks first."""
        if sampling.structured_outputs is None:
            return ""
        if self.reasoning == "openai_gptoss":
            return HARMONY_FINAL
        if not self._thinks and not leaves_open(prompt):
            return ""  # waiting for the end of thoughts that never begin would leave it unruled
        return CLOSE if thinking(self.reasoning, prompt) is not None else ""

    def thought_end(self, body: ChatCompletionRequest, prompt: str) -> str:
        """The mark that ends thoughts, where the request gives them a budget."""
        budget = body.thinking_token_budget
        if budget is None or budget < 0:
            return ""
        if not self.reasoning:
            raise bad_request(
                "`thinking_token_budget` needs a model whose thoughts are told apart; start the "
                "server with --reasoning-parser if this one thinks",
                "thinking_token_budget",
            )
        if self.reasoning == "openai_gptoss":
            return HARMONY_END
        return CLOSE if thinking(self.reasoning, prompt) is not None else ""

    def reader(
        self, body: ChatCompletionRequest, prompt: str, special_tokens: Iterable[str]
    ) -> Callable[[], Choice] | None:
        """Makes the reader of one choice; None where all of the text is the answer."""
        calls = body.uses_tools and (body.must_call or bool(self.tools))
        harmony = self.reasoning == "openai_gptoss" or (calls and self.tools == "openai")
        if not calls and not harmony and thinking(self.reasoning, prompt) is None:
            return None
        marks = (*special_tokens, PYTHON_TAG, TOOL_CALLS)
        strip = self.special(body) and body.skip_special_tokens is not False
        several = body.parallel_tool_calls is not False

        new_id = TOOL_FORMATS[self.tools].new_id if self.tools else long_id

        def make() -> Choice:
            return Choice(
                self._parser(body, calls and not harmony),
                Harmony() if harmony else thinking(self.reasoning, prompt),
                Strip(marks) if strip else None,
                several,
                new_id,
            )

        return make

    def _parser(self, body: ChatCompletionRequest, calls: bool) -> Parser:
        tools = body.tools or []
        if body.must_call:
            name = chosen(body.tool_choice, tools)
            return Named(name) if name else Required()
        if not calls:
            return Plain()
        schemas = {tool.function.name: tool.function.parameters or {} for tool in tools}
        return TOOL_FORMATS[self.tools].make(schemas)
