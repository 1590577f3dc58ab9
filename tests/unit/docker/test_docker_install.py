"""Claims about docker/install.py: which commands follow from a base; none of them is run here, but for two that do nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "docker"))
import found  # noqa: E402
import install  # noqa: E402

BARE = found.Base((3, 11))
TORCH = "/usr/local/lib/python3.12/dist-packages/torch"
NGC = found.Base((3, 12), "2.10.0a0+b558c986e8.nv25.11", TORCH, "13.0", "13.0", "2.9.0", "kernels", True, True)
DEVEL = replace(NGC, transformer_engine=None, apex="absent")  # torch and a compiler, as images named …-devel have
COMMIT = "f199212da7234bf9be2244cad5b9bfa2f5fe2675"
SETTINGS = install.read_settings(
    {"MINITRON_LOCKS": str(ROOT / "requirements"), "APEX_COMMIT": COMMIT, "TORCH_VERSION": "2.13.0+cpu", "EXTRAS": "export,nemo", "BUILD_JOBS": "4"}
)


def words(commands: list[install.Command]) -> str:
    return "\n".join(map(str, commands))


def test_nothing_is_compiled_on_nvidias_image_nor_without_cuda() -> None:
    assert install.plan_wheels(NGC, SETTINGS) == []
    assert install.plan_wheels(BARE, SETTINGS) == []


def test_transformer_engine_is_compiled_against_the_bases_torch_and_not_downloaded() -> None:
    (command,) = [each for each in install.plan_wheels(DEVEL, SETTINGS) if "transformer-engine-torch==2.11.0" in each.words]
    assert {"--no-build-isolation", "--no-deps"} <= set(command.words)
    assert command.environment["NVTE_PYTORCH_FORCE_BUILD"] == "TRUE"
    assert command.environment["MAX_JOBS"] == "4"


@pytest.mark.parametrize(("cuda", "core"), [("13.0", "transformer-engine-cu13==2.11.0"), ("12.8", "transformer-engine-cu12==2.11.0")])
def test_the_core_library_is_that_of_the_bases_cuda(cuda: str, core: str) -> None:
    planned = words(install.plan_wheels(replace(DEVEL, cuda=cuda, nvcc=cuda), SETTINGS))
    assert core in planned
    assert len(re.findall(r"transformer-engine-cu\d+==", planned)) == 1


def test_apex_comes_from_its_source_at_the_pinned_commit_for_the_architectures_asked_for() -> None:
    commands = install.plan_wheels(replace(NGC, apex="absent"), replace(SETTINGS, architectures=["8.0", "9.0"]))
    planned = words(commands)
    assert f"https://github.com/NVIDIA/apex {COMMIT}" in planned
    assert commands[-1].environment["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0"
    assert (commands[-1].environment["APEX_CPP_EXT"], commands[-1].environment["APEX_CUDA_EXT"]) == ("1", "1")
    assert "transformer" not in planned
    assert not any(word.startswith("apex") for command in commands for word in command.words)  # PyPI's package of that name


@pytest.mark.parametrize("commit", ["", "master", "25.09", COMMIT[:12]])
def test_a_name_that_may_move_is_no_commit(commit: str) -> None:
    with pytest.raises(found.BaseError, match="no full commit id"):
        install.plan_wheels(DEVEL, replace(SETTINGS, apex_commit=commit))


def test_git_is_installed_only_where_it_is_missing() -> None:
    assert "apt-get" not in words(install.plan_wheels(DEVEL, SETTINGS))
    assert "apt-get install -y --no-install-recommends git" in words(install.plan_wheels(replace(DEVEL, has_git=False), SETTINGS))


def test_a_base_with_torch_keeps_it() -> None:
    planned = words(install.plan_packages(NGC, SETTINGS, []))
    assert not re.search(r"(?<![\w-])torch==", planned)
    assert "--without-pip" in planned
    assert "--system-site-packages" in planned
    for command in install.plan_packages(NGC, SETTINGS, [])[1:]:
        assert "--no-deps" in command.words  # or pip could bring a torch that another package asks for


def test_a_base_without_torch_gets_the_cpu_build_from_its_index() -> None:
    last = install.plan_packages(BARE, replace(SETTINGS, torch_index="https://index.example/cpu"), [])[-1]
    assert last.words[-1] == "torch==2.13.0+cpu"
    assert last.words[last.words.index("--extra-index-url") + 1] == "https://index.example/cpu"
    assert "--extra-index-url" not in install.plan_packages(BARE, SETTINGS, [])[-1].words


def test_every_version_is_that_of_the_lock_and_none_of_it_is_transformer_engine() -> None:
    installed = [command.words for command in install.plan_packages(NGC, SETTINGS, [])][2]
    locked = set((ROOT / "requirements" / "gpu-py312.txt").read_text().split())
    pins = {word for word in installed if "==" in word}
    assert pins < locked
    assert {pin.split("==")[0].replace("-", "_") for pin in locked - pins} == {
        *("transformer_engine", "transformer_engine_cu12", "transformer_engine_cu13", "transformer_engine_torch")
    }


def test_compiled_wheels_are_installed_without_an_index() -> None:
    wheel = "/wheels/apex-0.1-cp312.whl"
    (command,) = [each for each in install.plan_packages(DEVEL, SETTINGS, [Path(wheel)]) if wheel in each.words]
    assert {"--no-index", "--no-deps"} <= set(command.words)


def test_a_python_without_a_lock_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(found.BaseError, match=r"bash launch/lock\.sh cpu-py311"):
        install.plan_packages(BARE, replace(SETTINGS, locks=tmp_path), [])


def test_the_project_is_installed_without_any_index() -> None:
    command = install.plan_project(SETTINGS)[0]
    assert "--no-index" in command.words
    assert command.words[-1] == "/opt/minitron/build/source[export,nemo]"


def test_the_check_fails_where_torch_is_not_the_bases(tmp_path: Path) -> None:
    for name, source in (("torch", "__version__ = '2.13.0'"), ("minitron_megatron", ""), ("megatron/core", "")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text(source)
    program = install.plan_check(replace(BARE, torch="2.13.0", torch_folder=str(tmp_path / "torch")), SETTINGS)[0].words[-1]
    other = install.plan_check(replace(BARE, torch="2.10.0", torch_folder=str(tmp_path / "torch")), SETTINGS)[0].words[-1]
    runs = [
        subprocess.run([sys.executable, "-S", "-c", each], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False)
        for each in (program, other)
    ]
    assert runs[0].returncode == 0, runs[0].stderr
    assert "torch is not the base's" in runs[1].stderr


def test_the_first_command_that_fails_ends_the_build(capfd: pytest.CaptureFixture[str]) -> None:
    commands = [
        install.Command(["sh", "-c", 'echo "said $WORD"'], {"WORD": "hello"}),
        install.Command(["sh", "-c", "exit 7"]),
        install.Command(["echo", "never"]),
    ]
    assert install.carry_out(commands, dry_run=False) == 7
    assert capfd.readouterr().out.splitlines() == ["+ WORD=hello sh -c 'echo \"said $WORD\"'", "said hello", "+ sh -c 'exit 7'"]


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    program = [sys.executable, "-S", str(ROOT / "docker" / "install.py"), "wheels", "--dry-run"]
    variables = {**os.environ, "PYTHONPATH": str(tmp_path), "MINITRON_WHEELS": str(tmp_path / "wheels")}
    run = subprocess.run(program, env=variables, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
    assert "unrelated web toolkit" in run.stderr
