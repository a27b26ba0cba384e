"""Log probabilities in the two shapes of OpenAI: one for chat, one for completions."""

from collections.abc import Callable, Sequence
from typing import Any

from octavo.server.protocol.chat import ChoiceLogprobs, TokenLogprob, TopLogprob
from octavo.server.protocol.completions import CompletionLogprobs

LOWEST = -9999.0  # JSON has no infinity

# One token: a dict of token id to Logprob(logprob, rank, decoded_token), the token itself included.
Row = dict[int, Any]


def _shown(token: int, entry: Any, as_ids: bool) -> str:
    return f"token_id:{token}" if as_ids else (entry.decoded_token or "")


def _likeliest(row: Row, top: int) -> list[tuple[int, Any]]:
    best = sorted(row.items(), key=lambda item: -item[1].logprob)
    return best if top < 0 else best[:top]


def chat_logprobs(
    token_ids: Sequence[int], rows: Sequence[Row], top: int, as_ids: bool
) -> ChoiceLogprobs:
    """`top` alternatives beside each token; -1 shows all that came."""
    content = []
    for token, row in zip(token_ids, rows, strict=False):
        own = _top(token, row[token], as_ids)
        best = _likeliest(row, top)
        others = [_top(t, entry, as_ids) for t, entry in best]
        content.append(TokenLogprob(own.token, own.logprob, own.bytes, others))
    return ChoiceLogprobs(content)


def _top(token: int, entry: Any, as_ids: bool) -> TopLogprob:
    shown = _shown(token, entry, as_ids)
    return TopLogprob(shown, max(entry.logprob, LOWEST), list(shown.encode(errors="replace")))


def completion_logprobs(
    token_ids: Sequence[int],
    rows: Sequence[Row | None],
    top: int,
    offset: int,
    as_ids: bool,
    text_of: Callable[[int], str],
) -> CompletionLogprobs:
    """`offset` characters of the choice come before the first of these tokens. `top` alternatives
    beside each; -1 shows all that came. A row of None is the first token of an echoed prompt:
    nothing came before it to predict it.
    """
    made = CompletionLogprobs([], [], [], [])
    for token, row in zip(token_ids, rows, strict=False):
        made.text_offset.append(offset)
        if row is None:
            made.tokens.append(f"token_id:{token}" if as_ids else text_of(token))
            offset += len(text_of(token))
            made.token_logprobs.append(None)
            made.top_logprobs.append(None)
            continue
        shown = _shown(token, row[token], as_ids)
        offset += len(row[token].decoded_token or "")
        made.tokens.append(shown)
        made.token_logprobs.append(max(row[token].logprob, LOWEST))
        best = _likeliest(row, top)
        made.top_logprobs.append(
            {_shown(t, e, as_ids): max(e.logprob, LOWEST) for t, e in best}
            | {shown: max(row[token].logprob, LOWEST)}
        )
    return made


def prompt_logprobs(rows: list[Row | None] | None) -> list[Any] | None:
    """The prompt's rows as JSON: null for the first token, then token id to its numbers."""
    if rows is None:
        return None
    return [
        None
        if row is None
        else {
            str(token): {
                "logprob": max(entry.logprob, LOWEST),
                "rank": entry.rank,
                "decoded_token": entry.decoded_token,
            }
            for token, entry in row.items()
        }
        for row in rows
    ]
