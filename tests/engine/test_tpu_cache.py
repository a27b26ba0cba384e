"""An engine whose cache and attention are the TPU's, interpreted on the CPU: the same text."""

from dataclasses import replace
from functools import partial

from jax.experimental.pallas import tpu as pltpu

from octavo.backends import tpu as backend
from octavo.backends.record import Backend
from octavo.pallas_kernels.attention import tpu
from tests.engine.tiny import LLAMA, Client, Reference, make_engine, make_parts, prompt


def interpreted(cpu: Backend) -> Backend:
    """A fake TPU: its cache and its kernels, on this CPU."""
    attend = partial(tpu.attend, chunk=32, interpret=pltpu.InterpretParams())
    return replace(
        cpu,
        attend=attend,
        init_cache=backend.init_cache,
        page_bytes=tpu.page_bytes,
        layers=backend.layers,
        stacked=True,
        whole_steps=True,
        row_buckets=lambda most: (most,),  # to interpret a kernel is to compile it for seconds
        token_buckets=lambda most: (most,),
    )


def test_requests_that_share_a_prefix_get_the_text_of_plain_attention() -> None:
    parts = make_parts(
        LLAMA,
        backend=interpreted,
        max_num_seqs=2,
        max_num_batched_tokens=32,
        max_model_len=96,
        page_size=16,
        num_pages=14,
        max_logprobs=1,
    )
    reference, core = Reference(parts), make_engine(parts)
    client = Client(core)
    first = prompt(37)
    asked = [first, first[:32] + prompt(3), prompt(5)]
    handles = [client.add(tokens, max_tokens=4, ignore_eos=True) for tokens in asked]
    client.drain()
    for handle, tokens in zip(handles, asked, strict=True):
        assert client.tokens[handle] == reference.text(tokens, 4, ignore_eos=True)
    core.close()
