"""Compile a whole model for one TPU from its config.json alone, on a machine without a TPU.

    python -m octavo.bench.tpu_model v6e FOLDER                 a decode step of 64 rows
    python -m octavo.bench.tpu_model v6e FOLDER --tokens 512    and 512 prompt tokens beside them

Prints what the program holds in HBM, and whether it copies the cache or the weights.
"""

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from octavo.bench.tpu_compile import CHIPS, NO_LIBTPU, compile_for, environment, libtpu_version

GIB = 1 << 30
HBM = {"v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 96}  # GiB that one program sees
CHILD = "OCTAVO_TPU_MODEL"


def program(chip: str, options: argparse.Namespace) -> tuple[Any, Any]:
    """The compiled forward pass, and the sizes that were decided for it."""
    import jax
    import jax.numpy as jnp

    from octavo.backends import tpu
    from octavo.engine import step
    from octavo.engine.assemble import cache_maker, open_model
    from octavo.engine.config import EngineConfig
    from octavo.engine.memory import resolve
    from octavo.engine.plan import plan_size
    from octavo.engine.programs import as_shard, new_state, one_shard
    from octavo.models.config import ModelConfig

    config = EngineConfig(
        model=options.model,
        load_format="dummy",
        max_num_seqs=options.rows,
        max_model_len=options.length,
        max_num_batched_tokens=max(options.tokens, 128),
        kv_cache_dtype="auto",
        offline=True,
    )
    backend = tpu.record(f"tpu: compiled for {chip}", (), lambda: HBM[chip] * GIB)
    resolved = resolve(config, backend, ModelConfig.from_hf(open_model(config).config))
    machine = step.Machine(resolved.dims, resolved.model, backend)
    state = jax.eval_shape(lambda: new_state(machine, cache_maker(backend, resolved)))
    params = resolved.model.abstract_params(resolved.dtype)

    def forward(params: Any, state: Any, vector: jax.Array) -> Any:
        plan = vector[0] if options.tokens else None
        out = step.forward(
            machine, params, one_shard(state), plan, rows=options.rows, tokens=options.tokens
        )
        return as_shard(out)

    vector = jax.ShapeDtypeStruct((1, plan_size(resolved.dims)), jnp.int32)
    return compile_for(chip, forward, (params, state, vector), donate=1), resolved


def copies(text: str, least: int) -> dict[str, int]:
    """The copies of at least `least` bytes in an optimized HLO module, and how often each is there.

    A copy inside of a fusion is how it reads its operand, and takes no memory.
    """
    sizes = {"bf16": 2, "s8": 1, "u8": 1, "f8e4m3fn": 1, "pred": 1}
    found: Counter[str] = Counter()
    inside = False
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            inside = line.startswith("%fused")
        made = re.search(r"= \(?(\w+)\[([\d,]+)\].* copy(?:-start)?\(", line)
        if made and not inside and "S(1)" not in line.split(" copy")[0]:  # which is VMEM
            size = math.prod(map(int, made[2].split(","))) * sizes.get(made[1], 4)
            if size >= least:
                found[f"{made[1]}[{made[2]}]"] += 1
    return dict(found)


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("chip", choices=list(CHIPS))
    parser.add_argument("model", help="a folder with a config.json")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--length", type=int, default=4096)
    options = parser.parse_args()
    if libtpu_version() is None:
        parser.error(NO_LIBTPU)
    if not os.environ.get(CHILD):
        with tempfile.TemporaryDirectory() as folder:
            given = {**environment(Path(folder)), CHILD: "1"}
            given["LIBTPU_INIT_ARGS"] = ""  # no schedules of a whole model
            command = [sys.executable, "-m", "octavo.bench.tpu_model", *sys.argv[1:]]
            sys.exit(subprocess.run(command, env=given).returncode)
    compiled, resolved = program(options.chip, options)
    sizes, text = compiled.memory_analysis(), compiled.as_text()
    memory = resolved.memory
    print(
        f"planned    {memory.weights / GIB:8.2f} GiB of weights, {memory.cache / GIB:.2f} of cache"
    )
    print(f"arguments  {sizes.argument_size_in_bytes / GIB:8.2f} GiB")
    print(f"in place   {sizes.alias_size_in_bytes / GIB:8.2f} GiB")
    print(f"temporary  {sizes.temp_size_in_bytes / GIB:8.2f} GiB of {HBM[options.chip]}")
    kernels = text.count('custom_call_target="tpu_custom_call"')
    print(f"kernels    {kernels:8}")
    large = copies(text, 8 << 20)
    print("copies of 8 MiB or more:", ", ".join(f"{n} of {what}" for what, n in large.items()) or 0)


if __name__ == "__main__":
    main()
