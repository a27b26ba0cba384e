"""Which launches of a prompt step's attention this GPU's command buffers take: counted, not timed.

    python -m octavo.bench.gpu_graphs

XLA leaves what it must trace (cuBLAS, Mosaic kernels) out of its graphs where driver or runtime are
older than CUDA 12.3, or where a compilation without a card does not say which they are.
"""

import functools
import os
import sys
import tempfile
from pathlib import Path


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="octavo-graphs-") as folder:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder}"
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer=+CONDITIONAL"
        _compile()
        files = sorted(Path(folder).glob("*two_layers*thunk_sequence_after_thunk_passes.txt"))
        if not files:
            print("XLA wrote no sequence of launches")
            return 1
        lines = files[-1].read_text().splitlines()
    outside = [line for line in lines if line and not line.startswith(" ")]
    graphs = sum("kCommandBuffer" in line for line in outside)
    print(f"{graphs} graphs take {len(lines) - len(outside)} launches; outside of them:")
    print(*(line[:70] for line in outside if "kCommandBuffer" not in line), sep="\n")
    return 0


def _compile() -> None:
    """Two layers' attention over 256 tokens, with a product between."""
    import jax  # after XLA_FLAGS

    from octavo.backends.gpu import capability_of
    from octavo.bench.gpu_attention import Shape, make
    from octavo.pallas_kernels.attention import gpu

    batch, q, (k, v), cache = make(Shape("", chunks=((0, 256),)), 64)
    attend = functools.partial(
        gpu.attend, window=0, scale=0.1, softcap=0.0, capability=capability_of(jax.devices()[0])
    )
    w = jax.numpy.zeros((4096, 4096), q.dtype)

    def two_layers(q, w, k, v, caches, batch):  # type: ignore[no-untyped-def]
        y, first = attend(q, k, v, caches[0], batch)
        q = (y.reshape(-1, 4096) @ w).reshape(q.shape)
        return *attend(q, k, v, caches[1], batch), first

    arguments = (q, w, k, v, (cache, cache), batch)
    options: dict[str, str | bool] = {"xla_gpu_enable_triton_gemm": False}
    jax.jit(two_layers).lower(*arguments).compile(compiler_options=options)


if __name__ == "__main__":
    sys.exit(main())
