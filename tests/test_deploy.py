"""The Slurm script starts what torchrun and `abyssal train` understand, and the image copies what there is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "deploy" / "slurm.sh"
#: Programs of a cluster: what they are asked is written down, and the command behind `srun` is run.
PROGRAMS = {
    "scontrol": '#!/bin/bash\necho "$@" >> "$ASKED/scontrol"\n'
    '[ "$1" = show ] && printf "gpu07\\ngpu08\\ngpu11\\n"\nexit 0\n',
    "srun": '#!/bin/bash\nwhile [[ $1 == --* ]]; do echo "$1" >> "$ASKED/srun"; shift; done\nexec "$@"\n',
    "torchrun": f"#!{sys.executable}\nimport json, os, sys, time\n"
    'json.dump(sys.argv[1:], open(os.environ["ASKED"] + "/torchrun", "w"))\n'
    'while "LASTS" in os.environ and "requeue" not in open(os.environ["ASKED"] + "/scontrol").read():\n'
    '    time.sleep(0.02)\nsys.exit(int(os.environ.get("CODE", 0)))\n',
}
JOB = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "gpu[07-08,11]"}


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """An environment with those programs."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return {**os.environ, **JOB, "PATH": f"{programs}:{os.environ['PATH']}", "ASKED": str(tmp_path)}


def submit(cluster: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=cluster, capture_output=True, text=True, check=False, timeout=60)


def test_job_is_one_launch_over_all_its_nodes(cluster: dict[str, str], tmp_path: Path) -> None:
    from torch.distributed.run import get_args_parser

    cluster["GPUS_PER_NODE"], cluster["MIN_NODES"] = "4", "2"
    ended = submit(cluster, "demo", "runs/a b", "--set", "parallel.ep_size=4", "--set", 'data.suffixes=[".md"]')
    assert (ended.returncode, ended.stderr) == (0, "")
    launch = get_args_parser().parse_args(json.loads((tmp_path / "torchrun").read_text()))
    assert (launch.nnodes, launch.nproc_per_node, launch.max_restarts) == ("2:3", "4", 100)
    assert (launch.rdzv_backend, launch.rdzv_endpoint, launch.rdzv_id) == ("c10d", "gpu07:29400", "4711")
    assert launch.module
    assert [launch.training_script, *launch.training_script_args] == [
        *("abyssal", "train", "demo", "--out", "runs/a b"),
        *("--set", "parallel.ep_size=4", "--set", 'data.suffixes=[".md"]'),
    ]
    assert "--no-kill" in (tmp_path / "srun").read_text().split()


def test_failure_of_the_ranks_is_that_of_the_job(cluster: dict[str, str]) -> None:
    assert submit({**cluster, "CODE": "3"}, "demo", "runs/a").returncode == 3


def test_job_near_its_end_goes_back_into_the_queue_while_the_ranks_go_on(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    with subprocess.Popen(
        ["bash", str(SCRIPT), "demo", "runs/a"], env={**cluster, "LASTS": "until the requeue"}
    ) as process:
        while not (tmp_path / "torchrun").exists():
            assert process.poll() is None
        process.send_signal(10)  # USR1
    assert process.returncode == 0
    assert (tmp_path / "scontrol").read_text().splitlines()[-1] == "requeue 4711"


@pytest.mark.parametrize(
    ("arguments", "missing", "sentence"),
    [(["demo"], None, "usage: sbatch --nodes N"), (["demo", "runs/a"], "SLURM_JOB_ID", "start this with sbatch")],
)
def test_wrong_call_is_refused(
    cluster: dict[str, str], arguments: list[str], missing: str | None, sentence: str
) -> None:
    ended = submit({name: value for name, value in cluster.items() if name != missing}, *arguments)
    assert ended.returncode != 0
    assert sentence in ended.stderr


def test_image_copies_only_what_exists_and_is_not_ignored() -> None:
    text = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    copied = [name for line in re.findall(r"^COPY (.+)$", text, re.M) for name in line.split()[:-1]]
    allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.M)
    assert copied
    assert set(copied) == set(allowed)
    assert all((ROOT / name).exists() for name in copied)
    for extra in re.findall(r"'\.\[(.+)\]'", text)[0].split(","):
        assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8"), extra
