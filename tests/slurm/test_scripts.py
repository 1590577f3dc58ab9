"""The batch scripts are accepted as they stand, and what they decide they decide right: there with programs that stand for SLURM's."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.chain import STAGES

from .conftest import REPOSITORY, Cluster

SCRIPTS = sorted(path.stem for path in (REPOSITORY / "slurm").glob("*.sh"))


def test_every_stage_of_the_chain_has_a_script() -> None:
    assert STAGES.keys() <= set(SCRIPTS)
    for stage in STAGES:
        assert f"run_stage {stage} " in (REPOSITORY / "slurm" / f"{stage}.sh").read_text()


@pytest.mark.slow
def test_slurm_accepts_every_script_as_it_stands(cluster: Cluster) -> None:
    for script in SCRIPTS:
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
            "container: a.sqsh\nmounts: /data,/scratch:/s  # ours\n",
            "--container-image=a.sqsh --container-mounts={root}:{root},/data:/data,/scratch:/s --container-workdir={root}",
        ),
        ({"srun": "", "apptainer": ""}, "container: a.sif\n", "apptainer exec --nv --bind {root}:{root} --pwd {root} a.sif"),
        ({"srun": "--container-image=path"}, "container: docker://nvcr.io#nvidia/pytorch:25.11-py3\n", "=docker://nvcr.io#nvidia/pytorch:25.11-py3 "),
        ({"srun": "--container-image=path", "apptainer": ""}, "container: a.sif\nruntime: apptainer\n", "apptainer exec --nv --bind"),
        ({"srun": "--container-image=path", "apptainer": ""}, "container: a.sif\nruntime: none\n", "--cpu-bind=none MINITRON_CONTAINER=\n"),
        ({"srun": "--container-image=path", "apptainer": ""}, "container:\n", "--cpu-bind=none MINITRON_CONTAINER=\n"),
        ({"srun": ""}, "container: a.sif\n", "neither Pyxis nor apptainer is here"),
    ],
    ids=["pyxis", "apptainer", "an image with a hash", "as the file says", "bare on purpose", "bare", "none"],
)
def test_a_step_runs_in_what_the_site_has(tmp_path: Path, programs: dict[str, str], lines: str, step: str) -> None:
    for name, help_text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{help_text}'\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "mine.yaml").write_text(lines)
    script = f'. slurm/common.sh; ROOT=$PWD; CLUSTER={tmp_path}/mine.yaml; read_cluster "$CLUSTER"; step_in_container; echo "${{STEP[@]}}"'
    script += ' "MINITRON_CONTAINER=${MINITRON_CONTAINER:-}"'
    path = f"{tmp_path}:/usr/bin:/bin"
    done = subprocess.run(["bash", "-c", script], cwd=REPOSITORY, env={"PATH": path}, capture_output=True, text=True)
    assert step.format(root=REPOSITORY) in done.stdout + done.stderr


@dataclass(frozen=True)
class Ended:
    """A batch script that has run its one step."""

    code: int
    output: str
    status: dict[str, Any]
    follower: dict[str, Any]
    """Of the stage behind it."""
    requeued: bool


SCONTROL = """#!/bin/bash
case "$1 $2" in
  "show hostnames") echo node1 ;;
  "show node") echo "NodeName=node1 NodeAddr=127.0.0.1" ;;
  "show job") echo "JobId=7 $JOB" ;;
  requeue*) touch "$LOGS/requeued" ;;
esac
"""
SRUN = """#!/bin/bash
number=0
for code in $CODES; do
  echo "$code" >"$MINITRON_JOB/code_$number"
  number=$((number + 1))
done
(cd "$MINITRON_STAGE_FOLDER" && eval "$SAVES")
[ -z "$TOLD" ] || printf '{\n  "state": "failed",\n  "step": 30,\n  "why": "%s"\n}\n' "$TOLD" >"$MINITRON_STAGE_FOLDER/status.json"
exit "$SRUN_CODE"
"""


def end_of_job(tmp_path: Path, *, codes: str, srun_code: int, job: str, told: str = "", stage: str = "distill", saves: str = "") -> Ended:
    """codes: of the nodes, told: what the launcher writes as the reason, job: what SLURM knows of the job, saves: a command of this start."""
    tmp_path.mkdir(exist_ok=True)
    for name, text in {"scontrol": SCONTROL, "srun": SRUN, "scancel": "#!/bin/sh\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    folders = [tmp_path / "runs" / f".{name}.partial" for name in (stage, "export")]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "status.json").exists():  # of an earlier start
            (folder / "status.json").write_text(json.dumps({"state": "queued", "job": str(7 + number)}, indent=2))
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_NNODES": "2", "CLUSTER": "configs/cluster/cpu.yaml", "LOGS": str(tmp_path)},
        **{"MINITRON_STAGE_FOLDER": str(folders[0]), "CODES": codes, "SRUN_CODE": str(srun_code), "JOB": job, "TOLD": told, "SAVES": saves},
    }
    command = ["bash", "-c", f". slurm/common.sh; run_stage {stage} recipe.yaml"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=30)
    mine, behind = (json.loads((folder / "status.json").read_text()) for folder in folders)
    requeued = tmp_path / "requeued"
    ended = Ended(done.returncode, done.stdout + done.stderr, mine, behind, requeued.exists())
    requeued.unlink(missing_ok=True)
    return ended


RUNNING = "JobState=RUNNING Reason=None Restarts=0"


@pytest.mark.parametrize(
    ("codes", "srun_code", "job", "code", "state", "why"),
    [
        ("75 75", 0, RUNNING, 75, "queued", "it was asked to stop: the time limit, or a pre-emption"),
        ("75 0", 0, RUNNING, 75, "queued", "it was asked to stop"),  # one node does all the work of some stages
        ("1 143", 143, RUNNING, 143, "queued", "the step ended with exit code 143"),
        ("75 1", 1, RUNNING, 1, "queued", "the step ended with exit code 1"),
        ("", 1, RUNNING, 1, "queued", "the step ended with exit code 1"),  # nothing was started: the image is not there, say
        ("2 75", 2, RUNNING, 2, "failed", "exit code 2; the log of job 7 says why"),
        ("143 2", 143, RUNNING, 2, "failed", "exit code 2"),
        ("75 143", 143, "JobState=COMPLETING Reason=TimeLimit Restarts=0", 143, "queued", "the step ended with exit code 143"),
        ("1 1", 1, "JobState=COMPLETING Reason=None Restarts=0", 1, "failed", "the job was cancelled; what it saved is kept"),
        ("1", 1, "JobState=COMPLETING Reason=None Restarts=1", 1, "queued by SLURM", "the step ended with exit code 1"),
    ],
)
def test_a_job_is_queued_again_unless_its_user_has_to_mend_something(
    tmp_path: Path, codes: str, srun_code: int, job: str, code: int, state: str, why: str
) -> None:
    ended = end_of_job(tmp_path, codes=codes, srun_code=srun_code, job=job)
    assert (ended.code, ended.status["state"], ended.requeued) == (code, state.split()[0], state == "queued"), ended.output
    assert ended.status["why"].startswith(why)
    assert ended.follower["state"] == ("failed" if state == "failed" else "queued") and ended.follower["job"] == "8"


def test_what_the_launcher_told_is_the_reason_in_the_status_and_in_the_log(tmp_path: Path) -> None:
    told = 'distill: step 3 has loss nan, \\"x\\"; lower it'  # as JSON has it
    failed = end_of_job(tmp_path, codes="2 2", srun_code=2, job=RUNNING, told=told)
    assert (failed.status["state"], failed.status["step"]) == ("failed", 30)
    assert failed.status["why"] == 'distill: step 3 has loss nan, "x"; lower it'
    early = end_of_job(tmp_path, codes="2", srun_code=2, job=RUNNING, told="runs/x/prune does not exist; make it with: minitron prune recipe.yaml")
    assert early.status["why"].endswith("or all that is missing with: slurm/pipeline_8b_to_4b.sh recipe.yaml")
    again = end_of_job(tmp_path / "again", codes="1 1", srun_code=1, job=RUNNING, told="distill: rank 3 was killed, probably out of memory")
    assert again.requeued and again.status["why"] == "distill: rank 3 was killed, probably out of memory"
    assert "queued again (job 7): distill: rank 3 was killed, probably" in again.output


def test_starts_count_until_one_gets_further(tmp_path: Path) -> None:
    saves = ("", "mkdir -p training/step_00000020", "", "mkdir training/step_00000040", "", "", "")  # of each start
    outcomes = [end_of_job(tmp_path, codes="1", srun_code=1, job=RUNNING, saves=command) for command in saves]
    assert [ended.requeued for ended in outcomes] == [True] * 6 + [False]
    assert outcomes[-1].status["why"] == "3 starts one after another got no further; the last one: the step ended with exit code 1"


def test_a_start_that_loses_its_node_counts_though_nobody_is_left_to_count_it(tmp_path: Path) -> None:
    """SLURM queues the job by itself; the fourth start begins nothing."""
    lost = "JobState=COMPLETING Reason=None Restarts=1"
    outcomes = [end_of_job(tmp_path, codes="1", srun_code=1, job=lost, told="rank 3 is gone") for _ in range(4)]
    assert [ended.status["state"] for ended in outcomes] == ["queued"] * 3 + ["failed"]
    assert outcomes[-1].status["why"] == "3 starts one after another got no further; the last one: rank 3 is gone"
    assert "job 7, start" in outcomes[0].output and "job 7, start" not in outcomes[-1].output


def test_a_stage_that_begins_anew_each_time_gets_no_further_by_rewriting_its_files(tmp_path: Path) -> None:
    outcomes = []
    for size in (50, 40, 50, 45):
        writes = f"head -c {size} /dev/zero >shard"
        outcomes.append(end_of_job(tmp_path, codes="1", srun_code=1, job=RUNNING, stage="import", saves=writes).requeued)
    assert outcomes == [True, True, True, False]


def test_a_mistake_that_the_script_finds_itself_is_told_in_the_status(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / ".distill.partial"
    folder.mkdir(parents=True)
    environment = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7", "LOGS": str(tmp_path), "MINITRON_STAGE_FOLDER": str(folder), "CLUSTER": "none.yaml"}
    command = ["bash", "-c", ". slurm/common.sh; run_stage distill x.yaml"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "none.yaml: no such cluster file" in done.stderr
    told = json.loads((folder / "status.json").read_text())
    assert told["state"] == "failed" and told["why"].startswith("none.yaml: no such cluster file")


VARIANTS = {"width": "llama31_8b_to_4b_width", "depth": "llama31_8b_to_4b_depth", "15b": "nemotron4_15b_to_8b"}


@pytest.mark.parametrize(("which", "recipe"), VARIANTS.items())
def test_the_variants_are_recipes_that_are_there(which: str, recipe: str) -> None:
    done = subprocess.run(["bash", "-c", f". slurm/common.sh; recipe_of {which}"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.strip() == f"configs/{recipe}.yaml" and (REPOSITORY / done.stdout.strip()).is_file()
    wrong = subprocess.run(["bash", "-c", ". slurm/common.sh; recipe_of wide"], cwd=REPOSITORY, capture_output=True, text=True)
    assert wrong.returncode == 2 and "wide is none of width, depth, 15b" in wrong.stderr
