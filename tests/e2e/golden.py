"""The golden rows: greedy continuations on which two independent engines agree in float32."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from octavo import SamplingParams
from octavo.models.checkpoint import CheckpointError
from octavo.models.sources.builtin import builtin_file

# One set of sizes for every engine of these tests, so that they share their compiled programs.
# 23 pages of 16 tokens are little more than one sequence of 256 tokens: several must be preempted.
SMALL: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 128,
    "num_pages": 24,
}


@dataclass(frozen=True)
class Row:
    """One row of greedy.json."""

    id: str
    model: str
    output_ids: list[int]
    text: str
    smallest_top2_gap: float
    prompt: str = ""
    chat: Any = ()  # messages
    input_ids: list[int] = field(default_factory=list)
    n_input_ids: int = 0

    @property
    def greedy(self) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=len(self.output_ids))

    @property
    def spoken(self) -> str:
        """The text as a user sees it: without the token that ends it."""
        return self.text.removesuffix("<|im_end|>")

    @property
    def finish_reason(self) -> str:
        return "stop" if self.text != self.spoken else "length"

    @property
    def prompt_tokens(self) -> int:
        return len(self.input_ids) or self.n_input_ids


def _rows() -> dict[str, Row]:
    path = Path(__file__).parent.parent / "golden" / "greedy.json"
    rows = [
        r for r in json.loads(path.read_text()) if r["model"] in ("smollm2-135m", "gemma3-270m")
    ]
    return {row["id"]: Row(**row) for row in rows}


ROWS = _rows()
COMPLETION, CHAT = ROWS["smollm2_completion"], ROWS["smollm2_chat"]
GEMMA = ROWS["gemma3_completion"]


def need(model: str) -> None:
    """Skip where the model's package is not installed; `make test` installs it."""
    try:
        builtin_file(model)
    except CheckpointError as error:
        pytest.skip(str(error))
