"""Claims of docker/README.md about the image, on a Debian base without torch: it builds, keeps no secret, runs as nobody in particular, says
whether it is in order, and runs the demo's first stages."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import building
import numpy as np
import pytest
from building import ROOT, Container
from safetensors import safe_open

pytestmark = pytest.mark.slow
NOTE = f"a-password-{secrets.token_hex(8)}"


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    folder = tmp_path_factory.mktemp("image")
    reason = building.why_not(folder)
    if reason:
        pytest.skip(reason)
    (folder / "storage").mkdir()
    with building.own_storage(folder / "storage") as nothing_runs:
        if nothing_runs:
            pytest.skip(f"buildah cannot run anything here, neither on overlay nor on vfs: {nothing_runs}")
        building.make_base()
        building.build(folder, note=NOTE)
        yield Container(building.output("buildah", "from", building.IMAGE))


def test_the_image_says_what_it_is(container: Container) -> None:
    config = container.described()["config"]
    assert config["Labels"]["org.opencontainers.image.revision"] == "0123abc"
    assert config["Labels"]["org.opencontainers.image.base.name"] == building.BASE
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert config["Healthcheck"]["Test"] == ["CMD", "minitron", "doctor"]
    assert config["User"] == "10001:10001"


def test_the_builders_pip_configuration_is_nowhere_in_it(container: Container) -> None:
    assert NOTE not in json.dumps(container.described())
    searched = ("/etc", "/home", "/opt/minitron", "/root", "/run", "/tmp", "/var", "/wheels", "/workspace")
    found = container.try_("grep", "--recursive", "--files-with-matches", "--no-messages", NOTE, *searched, user="0:0")
    assert found.stdout == ""
    assert found.returncode in (1, 2)  # 2: a folder of these is not there


def test_it_runs_as_a_user_who_cannot_change_it(container: Container) -> None:
    assert container.run("id", "-u").strip() == "10001"
    assert container.try_("touch", "/opt/minitron/venv/bin/minitron").returncode != 0
    container.run("touch", "/workspace/file")


def test_a_base_without_torch_has_the_cpu_build_and_keeps_it(container: Container) -> None:
    base = json.loads(container.run("cat", "/opt/minitron/base.json"))
    assert (base["torch"], base["cuda"]) == (None, None)
    held = container.run("cat", "/opt/minitron/torch.txt").strip()
    program = "import importlib.metadata, torch; print(importlib.metadata.version('torch'), torch.version.cuda)"
    assert container.run("python", "-c", program).split() == [held.removeprefix("torch=="), "None"]
    refused = container.try_("python", "-m", "pip", "install", "--no-index", "--dry-run", "torch==2.9.0")
    assert refused.returncode != 0
    assert "constraint" in refused.stdout + refused.stderr


def test_what_is_installed_is_what_is_locked(container: Container) -> None:
    python = container.run("python", "-c", "import sys; print('%d%d' % sys.version_info[:2])").strip()
    locked = dict(line.split("==") for line in (ROOT / "requirements" / f"cpu-py{python}.txt").read_text().split())
    listed = json.loads(container.run("python", "-m", "pip", "list", "--local", "--format=json"))
    installed = {re.sub(r"[-_.]+", "-", each["name"]).lower(): each["version"] for each in listed}
    assert {name: installed.get(re.sub(r"[-_.]+", "-", name).lower()) for name in locked} == locked
    assert set(installed) - {re.sub(r"[-_.]+", "-", name).lower() for name in locked} == {"torch", "minitron-megatron"}
    assert "No broken requirements found" in container.run("python", "-m", "pip", "check")


def test_its_health_check_tells_order_from_disorder(container: Container) -> None:
    command = container.described()["config"]["Healthcheck"]["Test"][1:]
    assert "runs on CPU over gloo" in container.run(*command, COLUMNS="200")
    container.run("mkdir", "-p", "/tmp/disorder/apex")
    container.run("touch", "/tmp/disorder/apex/__init__.py")
    disorder = container.try_(*command, PYTHONPATH="/tmp/disorder", COLUMNS="200")
    assert disorder.returncode == 1
    assert "unrelated web toolkit" in disorder.stdout


def test_a_user_without_an_account_can_run_it(container: Container) -> None:
    program = "import getpass, pathlib, torch; print(getpass.getuser()); pathlib.Path.home().joinpath('cache-4321').touch()"
    assert container.run("python", "-c", program, user="4321:4321").strip() == "minitron"


def test_a_checkout_in_the_work_folder_is_imported_by_its_own_script_alone(container: Container, tmp_path: Path) -> None:
    (tmp_path / "minitron_megatron").mkdir()
    (tmp_path / "minitron_megatron" / "__init__.py").write_text("")
    (tmp_path / "minitron_megatron" / "launcher.py").write_text("print('the checkout')")
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "torchrun.sh", tmp_path / "launch")
    tmp_path.chmod(0o755)
    volumes = (f"{tmp_path}:/workspace:ro",)
    assert "usage: launch/torchrun.sh" in container.try_("python", "-m", "minitron_megatron.launcher", "--help", volumes=volumes).stderr
    assert container.run("bash", "launch/torchrun.sh", volumes=volumes).strip() == "the checkout"


def test_nemo_opens_archives_in_it(container: Container) -> None:
    program = "from nemo.core.connectors.save_restore_connector import SaveRestoreConnector; import nemo; print(nemo.__version__)"
    assert container.run("python", "-c", program).strip().startswith("3.0.")


def test_the_demos_first_stages_run_in_it(container: Container, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "launch/demo_inputs.py", "--out", ".demo"], cwd=ROOT, check=True)
    tmp_path.chmod(0o777)  # the image's user writes here
    volumes = (f"{tmp_path}:/workspace", f"{ROOT / '.demo'}:/workspace/.demo:ro")
    recipe = "/opt/minitron/configs/smollm2_135m_to_97m.yaml"
    overrides = ("importance.samples=4", "importance.sequence_length=128")
    for stage in ("import", "data", "importance"):
        container.run("minitron", stage, recipe, *overrides, volumes=volumes, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    run = tmp_path / "runs" / "smollm2_135m_to_97m"
    manifest = json.loads((run / "importance" / "manifest.json").read_text())
    assert manifest["layout"]["pipeline"] == 2
    with safe_open(run / "importance" / "scores.safetensors", framework="np") as scores:
        tensors = {name: scores.get_tensor(name) for name in scores.keys()}  # noqa: SIM118
    assert tensors
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
