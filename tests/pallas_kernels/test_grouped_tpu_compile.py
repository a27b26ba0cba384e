"""The kernel for experts compiles for every chip and waits for memory; no TPU needed."""

import pytest

from octavo.bench.tpu_grouped import child
from octavo.engine.ahead.schedule import NO_LIBTPU, libtpu_version

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(libtpu_version() is None, reason=NO_LIBTPU),
]


@pytest.mark.parametrize("chip", ["v5e", "v6e", "tpu7x"])
def test_decode_rows_wait_for_weights_and_never_for_a_copy_of_the_stack(chip: str) -> None:
    rows = dict(child(chip, "8,512"))
    assert len(rows) == 8
    for name, numbers in rows.items():
        assert numbers["tile"] < numbers["copy"] * 1.1, name
        assert numbers["temporary"] < 1 << 20, name
        assert numbers["call"] * 1.15 < numbers["loop"], name
