"""The table of targets, and what it refuses."""

from pathlib import Path

import pytest

from octavo.backends.neuron import errors, neff, targets
from tests.neuron.fake_neuronx_cc import container

INF2, TRN1, TRN2 = (targets.target_of(name) for name in ("inf2", "trn1", "trn2"))


def test_instances_families_and_names_lead_to_the_same_target() -> None:
    assert targets.of_instance("inf2.xlarge") is targets.of_family(4) is INF2
    assert targets.of_instance("trn1n.32xlarge") is targets.of_family(3) is TRN1
    assert targets.of_instance("trn2.48xlarge") is targets.of_family(5) is TRN2
    assert targets.of_instance("m7i.large") is None and targets.of_family(1) is None


def test_no_two_targets_share_a_family_or_an_instance() -> None:
    families = [f for t in targets.TARGETS.values() for f in t.families]
    assert len(families) == len(set(families))
    for target in targets.TARGETS.values():
        assert targets.of_instance(target.instances[0] + "xlarge") is target


def test_what_works_is_not_refused() -> None:
    targets.check_parallel(INF2, 8, 32)
    targets.check_dtype(INF2, "bfloat16")
    targets.check_dtype(targets.target_of("trn3"), "float8_e4m3fn")
    targets.check_x64(False)
    targets.check_length(8192, (8192,))
    targets.check_graphs(("x",) * 36)


def test_a_neffs_header_is_read_field_by_field() -> None:
    whole = container(b"hlo", "decode", lnc=2)
    header = neff.parse(whole)
    assert header.name == "decode" and header.build == "fake" and header.version == (2, 0)
    assert (header.lnc, header.cores, header.data_size) == (2, 1, len(whole) - 1024)
    neff.check_lnc(header, "decode", 2)
    with pytest.raises(errors.LncMismatch, match="NEURON_LOGICAL_NC_CONFIG=2"):
        neff.check_lnc(header, "decode", 1)


@pytest.mark.parametrize(
    "data, says",
    [
        (b"short", "5 bytes"),
        (container(b"hlo", "x")[:-1], "instead of"),
        (b"\0" * 4096, "its header says to be 0"),
    ],
)
def test_what_is_no_neff_is_named(data, says) -> None:
    with pytest.raises(errors.NeffInvalid, match=says):
        neff.parse(data, Path("model.neff"))
