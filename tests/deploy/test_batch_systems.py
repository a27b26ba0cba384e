"""What Slurm and Ray start on each host, with others in the parts of Slurm and of the server."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TELL = (
    "import json, os, sys; names = ('OCTAVO_HOSTS', 'OCTAVO_HOST_INDEX', 'OCTAVO_LEADER'); "
    "open(os.path.join(sys.argv[1], os.environ['OCTAVO_HOST_INDEX']), 'w').write("
    "json.dumps([[os.environ[n] for n in names], sys.argv[2:]]))"
)


def write_program(path: Path, text: str) -> None:
    """By a process of its own: a file that a fork of this one holds open cannot be run."""
    write = ["bash", "-c", 'cat > "$0" && chmod u+x "$0"', str(path)]
    subprocess.run(write, input=f"#!/bin/bash\n{text}\n", text=True, check=True)


def test_slurm_starts_the_same_command_on_every_host_and_each_knows_its_place(tmp_path):
    programs, told = tmp_path / "bin", tmp_path / "told"
    programs.mkdir()
    told.mkdir()
    write_program(programs / "scontrol", 'echo "$*" > "$TOLD/scontrol"; printf "gpu7\\ngpu9\\n"')
    write_program(
        programs / "srun",
        'echo "$1" > "$TOLD/srun"; shift; export SLURM_PROCID\n'
        'for SLURM_PROCID in 0 1; do "$@"; done',
    )
    write_program(programs / "octavo", f'exec {sys.executable} -c "{TELL}" "$TOLD" "$@"')
    done = subprocess.run(
        ["bash", ROOT / "deploy" / "slurm.sbatch", "my model", "--mesh", "model=16"],
        env={
            "PATH": f"{programs}:{os.environ['PATH']}",
            "TOLD": str(told),
            "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "gpu[7,9]",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "http://gpu7:8000" in done.stdout
    assert (told / "scontrol").read_text() == "show hostnames gpu[7,9]\n"
    assert (told / "srun").read_text() == "--kill-on-bad-exit=1\n"
    flags = ["serve", "my model", "--mesh", "model=16", "--host", "0.0.0.0", "--port", "8000"]
    for index in ("0", "1"):
        assert json.loads((told / index).read_text()) == [["2", index, "gpu7:7461"], flags]


def test_ray_starts_it_on_hosts_of_its_own_and_ends_all_with_the_first(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="needs Ray: make deploy, or pip install 'octavo[ray]'")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    first, second = ({"num_cpus": 1, "include_dashboard": False}, {"num_cpus": 1})
    cluster = Cluster(initialize_head=True, head_node_args=first)
    cluster.add_node(**second)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        from octavo.ray_hosts import run

        # The second host waits for the end of the first, whose exit code is the job's.
        both = f"os.path.exists(os.path.join({str(tmp_path)!r}, '1'))"
        wait = f"import time\nwhile not {both}: time.sleep(0.1)\ntime.sleep(600 * int(index))"
        program = f"{TELL}\nindex = os.environ['OCTAVO_HOST_INDEX']\n{wait}\nsys.exit(7)"
        began = time.monotonic()
        code = run(2, {"CPU": 1}, [sys.executable, "-c", program, str(tmp_path)])
        assert code == 7
        assert time.monotonic() - began < 60, "the other was told to end"
        told = [json.loads((tmp_path / index).read_text())[0] for index in ("0", "1")]
        assert [one[:2] for one in told] == [["2", "0"], ["2", "1"]]
        assert told[0][2] == told[1][2] and told[0][2].endswith(":7461")
    finally:
        ray.shutdown()
        cluster.shutdown()
