"""The batch scripts are accepted as they stand, and shellcheck finds nothing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from minitron_megatron.chain import STAGES

from .conftest import REPOSITORY, Cluster

BATCH_SCRIPTS = sorted(path.stem for path in (REPOSITORY / "slurm").glob("*.sh") if "#SBATCH" in path.read_text())


def test_every_stage_of_the_chain_has_a_script() -> None:
    assert STAGES.keys() <= set(BATCH_SCRIPTS)
    for stage in STAGES:
        assert f"run_stage {stage} " in (REPOSITORY / "slurm" / f"{stage}.sh").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("script", BATCH_SCRIPTS)
def test_slurm_accepts_a_script_as_it_stands(cluster: Cluster, script: str) -> None:
    cluster.run("sbatch", "--test-only", f"slurm/{script}.sh", "configs/llama31_8b_to_4b_width.yaml")


@pytest.mark.slow
def test_slurm_would_not_accept_what_the_cluster_does_not_have(cluster: Cluster) -> None:
    """The test above can fail."""
    with pytest.raises(AssertionError, match="sbatch --test-only"):
        cluster.run("sbatch", "--test-only", "--nodes=3", "slurm/distill_8b_to_4b.sh")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed: apt-get install shellcheck")
def test_shellcheck_finds_nothing() -> None:
    scripts = [str(path) for folder in ("slurm", "launch") for path in sorted((REPOSITORY / folder).glob("*.sh"))]
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("gpus_pre_node: 8\n", "unknown name 'gpus_pre_node'"),
        ("partition: batch\n  nested: x\n", ":2: not of the form"),
        ("environment: NCCL_DEBUG\n", "'NCCL_DEBUG' is not of the form NAME=VALUE"),
    ],
)
def test_a_mistake_in_the_cluster_file_is_told_with_its_place(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    script = f'. slurm/common.sh; CLUSTER={file}; read_cluster "$CLUSTER"; export_site'
    done = subprocess.run(["bash", "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and told in done.stderr


@pytest.mark.parametrize("file", sorted((REPOSITORY / "configs" / "cluster").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_cluster_files_that_come_along_are_read(file: Path) -> None:
    script = f'. slurm/common.sh; read_cluster {file}; echo "${{SITE[starts_without_progress]}} ${{#SITE[@]}}"'
    done = subprocess.run(["bash", "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split()[0] == "3"


@pytest.mark.parametrize(
    ("programs", "lines", "step"),
    [
        (
            {"srun": "--container-image=path", "apptainer": ""},
            "container: a.sqsh\nmounts: /data\n",
            "--container-image=a.sqsh --container-mounts={root}:{root},/data",
        ),
        ({"srun": "", "apptainer": ""}, "container: a.sif\n", "apptainer exec --nv --bind {root}:{root} --pwd {root} a.sif"),
        ({"srun": "--container-image=path", "apptainer": ""}, "container: a.sif\nruntime: apptainer\n", "apptainer exec --nv --bind"),
        ({"srun": "--container-image=path", "apptainer": ""}, "container:\n", "srun --kill-on-bad-exit=1 --ntasks-per-node=1 --cpu-bind=none\n"),
        ({"srun": ""}, "container: a.sif\n", "neither Pyxis nor apptainer is here"),
    ],
    ids=["pyxis", "apptainer", "as the file says", "bare", "none"],
)
def test_a_step_runs_in_what_the_site_has(tmp_path: Path, programs: dict[str, str], lines: str, step: str) -> None:
    for name, help_text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{help_text}'\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "mine.yaml").write_text(lines)
    script = f'. slurm/common.sh; ROOT=$PWD; CLUSTER={tmp_path}/mine.yaml; read_cluster "$CLUSTER"; step_in_container; echo "${{STEP[@]}}"'
    path = f"{tmp_path}:/usr/bin:/bin"
    done = subprocess.run(["bash", "-c", script], cwd=REPOSITORY, env={"PATH": path}, capture_output=True, text=True)
    assert step.format(root=REPOSITORY) in done.stdout + done.stderr
