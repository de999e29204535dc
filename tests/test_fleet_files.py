"""The files of examples/fleet/ say commands that exist: a dry run with recording stand-ins for
Slurm's, Ray's and torch's commands, whose persea lines the real command line then parses.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from persea import cli

FLEET = Path(__file__).resolve().parent.parent / "examples" / "fleet"
STAND_IN = """#!/bin/bash
line=$(printf '%q ' "$(basename "$0")" "$@")
echo "$line" >> "$RECORD"  # one write: commands in the background write at the same time
case "$(basename "$0")" in
  scontrol) printf 'node1\\nnode2\\nnode3\\n' ;;
  srun) while [ $# -gt 0 ]; do case $1 in ray|torchrun) exec "$@";; esac; shift; done ;;
esac
"""


def dry_run(folder: Path, command: list[str], **variables: str) -> list[list[str]]:
    """Run a script with stand-ins; the commands that it ran, in the order of their names."""
    programs = folder / "programs"
    programs.mkdir()
    for name in ("scontrol", "srun", "ray", "torchrun", "persea", "sleep", "pip"):
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    record = folder / "record"
    record.touch()
    subprocess.run(
        command,
        check=True,
        timeout=60,
        capture_output=True,  # and so until the last command in the background has ended
        cwd=folder,
        env=os.environ
        | {"PATH": f"{programs}:{os.environ['PATH']}", "RECORD": str(record), "HOME": str(folder)}
        | variables,
    )
    return [shlex.split(line) for line in record.read_text().splitlines()]


def ran(commands: list[list[str]], name: str) -> list[list[str]]:
    return [c for c in commands if c[0] == name]


def refuse_unknown_options(arguments: list[str]) -> None:
    """Let persea's own command line parse the arguments, without running anything."""
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    command = group.commands[arguments[0]]
    context = command.make_context(arguments[0], list(arguments[1:]), resilient_parsing=False)
    changes = context.params["set_"]
    from persea.config.recipe import load_recipe
    from tests.cli.test_cli import ROOT

    load_recipe(ROOT / "recipes" / "quickstart.yaml", list(changes))


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 0), (3, 8)])
def test_a_slurm_job_starts_a_cluster_with_a_token_and_captures(
    tmp_path: Path, nodes: int, gpus: int
) -> None:
    script = ["bash", str(FLEET / "capture_ray.sbatch"), "recipe.yaml", "runs/x"]
    slurm = {
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_GPUS_ON_NODE": str(gpus),
    }
    commands = dry_run(tmp_path, script, **slurm)
    starts = [c for c in ran(commands, "ray") if c[1] == "start"]
    assert sum("--head" in c for c in starts) == 1
    assert sum("--address=node1:6379" in c for c in starts) == (nodes > 1)
    assert ["ray", "get-auth-token", "--generate"] in commands
    (persea,) = ran(commands, "persea")
    assert f"executor.gpus_per_worker={min(gpus, 1)}" in persea
    assert "executor.address=node1:6379" in persea
    refuse_unknown_options(persea[1:])
    if nodes > 1:
        workers = [c for c in ran(commands, "srun") if "--exclude=node1" in c]
        assert [c[1] for c in workers] == [f"--nodes={nodes - 1}"]


def test_a_slurm_job_trains_under_torchrun(tmp_path: Path) -> None:
    script = ["bash", str(FLEET / "train_torchrun.sbatch"), "recipe.yaml", "runs/x"]
    slurm = {"SLURM_JOB_NODELIST": "n", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_ID": "7"}
    (command,) = ran(dry_run(tmp_path, script, **slurm), "torchrun")
    assert "--nnodes=3" in command
    assert "--rdzv-endpoint=node1:29400" in command
    module = command.index("-m")
    assert command[module + 1] == "persea.cli"
    refuse_unknown_options(command[module + 2 :])


def test_a_cloud_job_takes_units_from_the_store_again(tmp_path: Path) -> None:
    task = yaml.safe_load((FLEET / "skypilot.yaml").read_text())
    assert task["resources"]["use_spot"]
    commands = dry_run(tmp_path, ["bash", "-c", task["setup"] + task["run"]], **task["envs"])
    (persea,) = ran(commands, "persea")
    assert f"capture.store={task['envs']['STORE']}" in persea
    refuse_unknown_options(persea[1:])
    assert ran(commands, "pip") == [["pip", "install", "persea[ray,s3]"]]
