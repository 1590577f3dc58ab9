"""lm-eval task files as plain data: what a YAML file and its includes say, and which files it reads.

Read here without lm-eval, because importing that takes a second (it brings pandas and datasets), and because a task
that asks a hub for its data would only fail there, on a machine without a network, after a long wait.
"""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from minitron_megatron.errors import DataError

LOCAL_FORMATS = ("json", "csv", "parquet", "text", "arrow")
"""Values of `dataset_path` that read files instead of asking a hub."""


class _Function(str):
    """`module.name`, of a Python file beside the task file or of an installed module."""


class _Loader(yaml.SafeLoader):
    """YAML with lm-eval's `!function module.name`, kept as text."""


_Loader.add_constructor("!function", lambda loader, node: _Function(str(node.value)))


@dataclass(frozen=True)
class TaskFile:
    """One multiple-choice task whose data are local files."""

    path: Path
    name: str
    data_files: list[Path]
    sources: list[Path]
    """The YAML file, those it includes, and the Python files beside it whose functions it names."""


def read_task_file(path: str) -> TaskFile:
    """Raises DataError where the file or its data are missing, or the task is not multiple choice on local data."""
    fields, sources = _fields(Path(path), ())
    if not isinstance(fields.get("task"), str):
        raise DataError(
            f"{path}: no single task: `task` must be its name; groups of tasks are not supported, list their files",
        )
    kind = fields.get("output_type", "generate_until")
    if kind != "multiple_choice":
        raise DataError(f"{path}: output_type is {kind}; only multiple_choice (scored by log-likelihood) is supported")
    return TaskFile(Path(path), fields["task"], _data_files(path, fields), sources)


def task_files_outside(task_files: list[str]) -> list[Path]:
    """Every file that shapes the tasks' results, for an artifact's hash: YAML, includes, functions and data."""
    tasks = [read_task_file(path) for path in task_files]
    return sorted({file for task in tasks for file in (*task.sources, *task.data_files)})


def _fields(path: Path, includers: tuple[Path, ...]) -> tuple[dict[str, Any], list[Path]]:
    """The task's fields, its own winning over included ones, and the files they come from."""
    if not path.is_file():
        named_in = f" (included by {includers[-1]})" if includers else ""
        raise DataError(f"{path}{named_in}: no such task file; tasks are .yaml files of lm-eval")
    if path in includers:
        raise DataError(f"{path}: includes itself")
    try:
        own = yaml.load(path.read_text(), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(own, dict):
        raise DataError(f"{path}: a task file is a mapping of fields, found {type(own).__name__}")
    fields: dict[str, Any] = {}
    sources = [path, *_function_files(path, own)]
    for include in _as_list(own.pop("include", [])):
        included, more = _fields(path.parent / include, (*includers, path))
        fields, sources = {**fields, **included}, sources + more
    return {**fields, **own}, sources


def _function_files(path: Path, fields: dict[str, Any]) -> list[Path]:
    modules = [value.rpartition(".")[0].replace(".", "/") for value in fields.values() if isinstance(value, _Function)]
    beside = [path.parent / f"{module}.py" for module in modules]
    return [file for file in dict.fromkeys(beside) if file.is_file()]


def _data_files(path: str, fields: dict[str, Any]) -> list[Path]:
    """What `dataset_kwargs.data_files` names: a file, a list, or those of each split; from the current folder."""
    named = (fields.get("dataset_kwargs") or {}).get("data_files")
    if fields.get("dataset_path") not in LOCAL_FORMATS or not named:
        raise DataError(
            f"{path}: dataset_path={fields.get('dataset_path')!r} asks a hub for its data; "
            "use dataset_path: json with dataset_kwargs.data_files naming local files"
        )
    parts = list(named.values()) if isinstance(named, dict) else [named]
    patterns = [str(pattern) for part in parts for pattern in _as_list(part)]
    missing = [pattern for pattern in patterns if not glob.glob(pattern, recursive=True)]
    if missing:
        here = Path.cwd()
        raise DataError(f"{path}: data file {missing[0]} does not exist; paths start from the current folder, {here}")
    return [Path(file) for pattern in patterns for file in sorted(glob.glob(pattern, recursive=True))]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
