"""The TPU kernels compile for every chip, and cost no more than they did; no TPU needed."""

import json
from pathlib import Path

import pytest

from octavo.bench.tpu_static import grown
from octavo.engine.ahead.attention import Numbers, costs
from octavo.engine.ahead.schedule import BRANCH, CHIPS, NO_LIBTPU, Schedule, libtpu_version

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "tpu_static.json").read_text())
ROWS: dict[str, Numbers] = GOLDEN["rows"]

needs_libtpu = pytest.mark.skipif(libtpu_version() is None, reason=NO_LIBTPU)
needs_the_pinned = pytest.mark.skipif(
    libtpu_version() != GOLDEN["libtpu"],
    reason=f"the numbers are of libtpu {GOLDEN['libtpu']}, here is {libtpu_version()}",
)


@pytest.mark.aot
@needs_the_pinned
@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
def test_no_cost_grew_by_more_than_3_percent(chip: str) -> None:
    now = dict(costs(chip))
    assert now.keys() == {name for name in ROWS if name.startswith(chip)}
    assert grown(now, ROWS) == []


@pytest.mark.aot
@needs_libtpu
@pytest.mark.parametrize(
    "heads", [(32, 32, 128), (8, 1, 128), (14, 2, 64), (9, 3, 64), (8, 4, 256)]
)
def test_every_head_layout_compiles(heads: tuple[int, int, int]) -> None:
    for chip in ("v5e", "v6e"):
        ((_, numbers),) = costs(chip, heads=heads, kinds=("bfloat16",), pages=(16,))
        assert numbers["decode"] > 0


def share(name: str) -> float:
    return ROWS[name]["decode"] / ROWS[name]["copies"]


def test_decode_waits_for_memory_and_not_for_instructions() -> None:
    """What is kept must itself be good: the kept shares of the copies' cycles."""
    assert share("v6e bfloat16 page 128") <= 0.36
    assert share("tpu7x bfloat16 page 128") <= 0.66
    assert share("v6e float8_e4m3fn page 128") <= 0.75
    assert [name for name in ROWS if share(name) >= 1.0] == []


@pytest.mark.parametrize(
    "chip, most", [("v5e", 0.02), ("v5p", 0.03), ("v6e", 0.04), ("tpu7x", 0.05)]
)
def test_small_pages_cost_a_small_part_of_the_copies(chip: str, most: float) -> None:
    small, large = (share(f"{chip} bfloat16 page {page}") for page in (16, 128))
    assert small - large <= most


def test_growth_is_named_and_3_percent_are_let_through() -> None:
    kept = {"a": {"decode": 1000, "spills": 0}}
    assert grown({"a": {"decode": 1030, "spills": 0}}, kept) == []
    assert grown({"a": {"decode": 900, "spills": 1}}, kept) == ["a: spills grew from 0 to 1"]
    assert "grew from 1,000 to 1,031" in grown({"a": {"decode": 1031}}, kept)[0]
    assert "was not kept" in grown({"b": {"decode": 1}}, kept)[0]


LISTING = """\
     0   :  { %s0 = inlined }
   0x1 LB: > { %v1 = vld } /* Start region 7 */
   0x2   : > { %3 = sbr.rel (%p1) target = $region8 }
FILLER
  0x14 PF: > { %v4 = vmatmul.bf16 } /* Start/End empty region 8 */
  0x15   : > { %5 = sbr.rel (%p2) target = $region9 }
DOTS
  0x28 PF: > { %6 = sbr.rel (%p3) target = $region7 } /* Start/End empty region 9 */
  0x29   : > { %7 = nop }
  0x2a   : > { %7 = nop }
  0x2b   : > { %7 = nop }
  0x2c   : > { %7 = nop }
"""


def test_the_hot_path_skips_what_multiplies_nothing(tmp_path: Path) -> None:
    filler = "\n".join(f" {at:#x}   : > {{ %9 = add }}" for at in range(0x3, 0x14))
    dots = "\n".join(f" {at:#x}   : > {{ %v9 = vmatmul.bf16 }}" for at in range(0x16, 0x28))
    text = LISTING.replace("FILLER", filler).replace("DOTS", dots)
    (tmp_path / "1-kernel.1-72-final_bundles.txt").write_text(text)
    uses = "== UTILIZATION:\n0 0 0 0 0 0 0 0 0 0\n1 0 0 0 0 0 0 1 2 0\n"
    (tmp_path / "1-kernel.1-70-final_hlo-static-per-bundle-utilization.txt").write_text(uses)
    schedule = Schedule(tmp_path, "kernel")
    assert (schedule.bundles, schedule.spills) == (0x2D, 2)
    (loop,) = schedule.loops()
    assert loop == (0x1, 0x2C)
    # 0x1, the branch over the filler, and all from 0x14 to the end.
    assert schedule.hot_path(loop) == 1 + BRANCH + (0x2D - 0x14)
