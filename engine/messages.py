"""What crosses between an API process and the engine process. No jax here.

Everything is a `msgspec` struct encoded as msgpack; what is many tokens at once is raw
little-endian bytes, so that a step of 256 sequences is one small message and not 256 objects.
"""

from enum import IntEnum

import msgspec

from octavo.engine.sampling_params import SamplingParams

# Upper bounds of the buckets in which steps are counted by their tokens, prompt and generated.
ITERATION_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class AddRequest(msgspec.Struct, tag="add", array_like=True, omit_defaults=True):
    """One prompt. It becomes `sampling.n` sequences with the handles handle, handle + 1, ..."""

    handle: int  # chosen by the client, never reused while alive
    request_id: str
    prompt: bytes  # i32[prompt_len]
    sampling: SamplingParams
    bad_words: list[list[int]] = []  # tokenized by the client
    priority: int = 0  # lower first, then arrival
    arrival: float = 0.0  # seconds, time.monotonic of the host
    cache_salt: str = ""
    timeout: float = 0.0  # seconds from arrival; 0 is none
    grammar: str = ""  # checked by the client; `sampling.structured_outputs` does not travel
    mask_after: list[int] = []  # the grammar begins behind these tokens; empty is at once
    thought_end: list[int] = []  # the mark that ends thoughts, where these have a budget


class Abort(msgspec.Struct, tag="abort", array_like=True):
    """Forget these sequences; those unknown or finished are no error."""

    handles: list[int]


class EncodeRequest(msgspec.Struct, tag="encode", array_like=True, omit_defaults=True):
    """One text, or a pair of texts as one, that a model which only reads turns into a vector."""

    handle: int  # chosen by the client, never reused while alive
    request_id: str
    prompt: bytes  # i32[n]
    second: int = 0  # where the second text of a pair begins; 0: there is one text
    arrival: float = 0.0  # seconds, time.monotonic of the host


class Finish(msgspec.Struct, array_like=True):
    """The end of one sequence."""

    handle: int
    reason: str  # "stop" | "length" | "abort" | "error"
    stop_token: int = -1  # the stop token that ended it; -1: the end-of-sequence token or none
    message: str = ""  # for "error": what went wrong, one sentence
    status: int = 500  # for "error": the HTTP status that says whose fault it was


class Start(msgspec.Struct, array_like=True):
    """A sequence got its slot."""

    handle: int
    cached_tokens: int  # prompt tokens found in the prefix cache
    queued: float  # seconds from arrival to here


class Logprobs(msgspec.Struct, array_like=True):
    """Log probabilities beside one position of one sequence."""

    handle: int
    position: int  # of the token the distribution is over; a prompt's row when below its length
    tokens: bytes  # i32[1 + k + named]: the token itself, the k likeliest, those asked for by id
    logprobs: bytes  # f32[1 + k + named]
    rank: int  # of the token itself, 1 is the likeliest
    named: int = 0


class Encoded(msgspec.Struct, array_like=True):
    """What a text became. Its Finish is in the same message."""

    handle: int
    vector: bytes  # f32[Pooler.size], not normalized; of a classifier the numbers of its labels


class Stats(msgspec.Struct, array_like=True):
    """Where the engine stands, for metrics and the live view."""

    running: int = 0
    waiting: int = 0
    slots: int = 0
    pages: list[int] = []  # per group: pages in the pool, the trash page not counted
    pages_free: list[int] = []  # per group: on the free stack as last harvested
    pages_cached: list[int] = []  # per group: kept by the prefix index, used by no row
    preemptions: int = 0  # these and the next are totals since start
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0  # tokens looked up
    prefix_hits: int = 0  # tokens found
    steps: int = 0
    stalls: int = 0  # reads that blocked while no later step was in flight
    compiles_after_ready: int = 0
    host_seconds: float = 0.0  # host time spent in turns, device waits not counted
    in_flight: int = 0
    restarts: int = 0  # times the state was rebuilt after a step raised
    evictions: int = 0  # pages that the prefix index gave up for others
    page_waits: int = 0  # turns in which nothing could be dispatched for want of pages
    deferred: int = 0  # of `waiting`: choices that wait for their request's first one
    iterations: list[int] = []  # steps by their tokens, counted in the buckets ITERATION_TOKENS
    iteration_tokens: int = 0  # their sum
    resident_bytes: int = 0  # memory of the engine's process that is in RAM
    hosts: int = 1
    orders: int = 0  # messages that the leader of several hosts sent to each, one or two a step
    order_bytes: int = 0  # their sizes together


class Output(msgspec.Struct, tag="output", array_like=True, omit_defaults=True):
    """What one harvested step gave: row i of `tokens` belongs to `handles[i]`."""

    handles: bytes = b""  # u32[n]
    tokens: bytes = b""  # i32[n]
    starts: list[Start] = []
    finished: list[Finish] = []  # their last tokens are in `tokens` of this same message
    logprobs: list[Logprobs] = []
    stats: Stats | None = None
    encoded: list[Encoded] = []


class Pooler(msgspec.Struct, array_like=True):
    """What an engine that only reads gives for a text."""

    task: str  # "embed": an embedding; "score": the numbers of a classifier's labels
    size: int  # numbers in a vector
    normalize: bool = True  # embeddings are meant to have length 1
    dimensions: list[int] = []  # lengths that embeddings may be cut to; none is any
    activation: str = "sigmoid"  # what a score goes through: "sigmoid" | "identity"


class Ready(msgspec.Struct, tag="ready", array_like=True):
    """The engine can generate."""

    model: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    max_num_seqs: int
    max_num_batched_tokens: int
    summary: list[str]  # the start-up lines
    startup_seconds: float
    page_size: int = 0  # tokens in a page of the cache
    kv_dtype: str = ""  # of the cache
    pooler: Pooler | None = None  # None: the engine generates


class Dead(msgspec.Struct, tag="dead", array_like=True):
    """The engine cannot go on; its last words."""

    message: str


# What a cell of a PageMap says in its low 16 bits: one of these, or FIRST_SLOT + the slot.
FREE_PAGE, IDLE_PAGE, RETURNING_PAGE, TRASH_PAGE, FIRST_SLOT = 0, 1, 2, 3, 4
SHARERS_SHIFT, USED_SHIFT = 16, 24  # bits 16 to 23: rows that refer to it; 24 to 31: see PageMap


class SlotState(IntEnum):
    """What the sequence in a slot is doing."""

    PREFILL = 0
    DECODE = 1
    STOPPING = 2  # aborted or ended by the host: the slot is free after a harvest
    PREEMPTING = 3  # goes back to the queue after a harvest


class Watch(msgspec.Struct, tag="watch", array_like=True):
    """Send a View every `every` seconds, for `seconds` from now; 0 seconds ends it."""

    seconds: float
    every: float = 0.2


class PageMap(msgspec.Struct, array_like=True):
    """Who has which page of one group, as far as harvested.

    A cell is `per_cell` pages in a row. Its low 16 bits name the owner (of a shared page the
    highest slot, of several pages the highest owner), its top 8 how many of its pages are in rows.
    """

    pages: int  # in the pool, the trash page counted
    window: int  # tokens that a layer of this group sees; 0 is all
    per_cell: int
    cells: bytes  # u32[cells]
    hits: bytes  # u32[n] cells that the prefix index gave to a new sequence since the last view


class View(msgspec.Struct, tag="view", array_like=True):
    """The engine at one moment, for those who watch."""

    time: float  # seconds, time.monotonic of the host: for rates from the totals in `stats`
    stats: Stats
    page_size: int  # tokens in a page
    maps: list[PageMap]  # per group
    # u32[n, 7] slots that are somebody's: slot, handle of the engine, SlotState, prompt tokens,
    # tokens so far, tokens where this state ends, pages of all groups
    slots: bytes


ToEngine = AddRequest | Abort | EncodeRequest | Watch
FromEngine = Output | Ready | Dead | View
