"""A fake neuronx-cc: it takes the real one's command line and wraps the HLO in a NEFF's container.

It compiles nothing. What it proves: the command line, the folder it runs in, what becomes of exit
codes, time limits and half files. FAKE_NEURONX_CC says how it behaves: ok, exit:N:text, kill,
slow:SECONDS, partial, nothing. FAKE_NEURONX_CC_CALLS is a file that gets a line a call.
"""

import io
import json
import os
import signal
import struct
import sys
import tarfile
import time
from pathlib import Path

PAIRS = {
    "--framework": ("XLA",),
    "--target": ("inf2", "trn1", "trn1n", "trn2", "trn3"),
    "--model-type": ("generic", "transformer", "unet-inference"),
    "--auto-cast": ("none", "matmult", "all"),
    "--optlevel": ("1", "2", "3"),
    "--lnc": ("1", "2"),
    "--verbose": ("info", "warning", "error", "critical", "debug"),
    "--logfile": None,
    "--output": None,
}
ALONE = ("--enable-saturate-infinity", "--enable-fast-loading-neuron-binaries")


def parse(argv: list[str]) -> tuple[Path, dict[str, str]]:
    """The input and the options; exits with 2 on anything that the real one does not document."""
    if argv[:1] != ["compile"] or len(argv) < 2:
        sys.exit(2)
    options, rest = {}, argv[2:]
    while rest:
        name = rest.pop(0)
        if name in ALONE:
            continue
        if name not in PAIRS or not rest:
            print(f"unrecognized arguments: {name}", file=sys.stderr)
            sys.exit(2)
        options[name] = rest.pop(0)
        allowed = PAIRS[name]
        if allowed is not None and options[name] not in allowed:
            print(f"invalid choice for {name}: {options[name]}", file=sys.stderr)
            sys.exit(2)
    if "--lnc" in options and options["--target"] in ("inf2", "trn1", "trn1n"):
        print("--lnc needs trn2", file=sys.stderr)
        sys.exit(2)
    return Path(argv[1]), options


def container(hlo: bytes, name: str, lnc: int = 0) -> bytes:
    """A NEFF's header and a tar archive, which holds the HLO instead of a program."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        entry = tarfile.TarInfo("fake/model.hlo.pb")
        entry.size = len(hlo)
        tar.addfile(entry, io.BytesIO(hlo))
    return header(len(packed.getvalue()), name, lnc) + packed.getvalue()


def header(size: int, name: str, lnc: int) -> bytes:
    """The 1,024 bytes that AWS documents, field by field."""
    numbers = struct.pack("<QQQQQ", 2, 1024, size, 2, 0)
    build, digest, uuid = b"fake".ljust(128, b"\0"), bytes(32), bytes(16)
    text = name.encode()[:255].ljust(256, b"\0")
    cores = struct.pack("<I", 1)
    tail = cores + b"\1".ljust(64, b"\0") + struct.pack("<QI", 0, lnc)
    return (numbers + build + cores + digest + uuid + text + tail).ljust(1024, b"\0")


def main() -> None:
    """One compile, or the list of operators."""
    if sys.argv[1:] == ["list-operators", "--framework", "XLA"]:
        print("Abs\nAdd\nDotGeneral")
        return
    source, options = parse(sys.argv[1:])
    Path("litter.txt").write_text("the real one leaves files in the folder it runs in")
    if calls := os.environ.get("FAKE_NEURONX_CC_CALLS"):
        with open(calls, "a") as out:
            out.write(json.dumps({"argv": sys.argv[1:], "cwd": os.getcwd()}) + "\n")
    how, _, rest = os.environ.get("FAKE_NEURONX_CC", "ok").partition(":")
    if how == "exit":
        code, _, text = rest.partition(":")
        Path(options["--logfile"]).write_text(text)
        sys.exit(int(code))
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "slow":
        time.sleep(float(rest))
    made = container(source.read_bytes(), source.name, int(options.get("--lnc", "0")))
    if how == "partial":
        made = made[: len(made) - 1000]
    if how != "nothing":
        Path(options["--output"]).write_bytes(made)


if __name__ == "__main__":
    main()
