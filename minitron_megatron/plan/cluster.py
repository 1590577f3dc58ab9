"""The cluster file (configs/cluster/*.yaml), as far as a plan asks it: flat, one `name: value` a line; what slurm/common.sh reads is passed over."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from minitron_megatron.errors import PlatformError
from minitron_megatron.plan.gpus import ACCELERATORS, DEFAULT, Accelerator

CLUSTER = "cluster="
"""Start of the override that names the file."""
OURS = ("gpu", "nodes", "gpus_per_node", "processes_per_node", "network_gb_per_s")
OF_THE_SCRIPTS = (
    *("partition", "account", "qos", "container", "runtime", "mounts", "environment", "gpu_free_gib", "memory_free_gib", "disk_free_gb"),
    *("all_reduce_gb_per_s", "starts_without_progress"),
)
NETWORK_GB_PER_S = 50.0
"""Of each GPU, in one direction: an adapter of 400 Gbit/s each, as in a DGX H100."""


@dataclass(frozen=True)
class Cluster:
    """What a plan is made for; without a GPU memory is counted and time is not."""

    gpu: Accelerator | None
    per_node: int
    nodes: int | None = None
    """None: as many as the layout takes."""
    network_bytes_per_second: float = NETWORK_GB_PER_S * 1e9
    named: str = ""

    @property
    def processes(self) -> int | None:
        return self.nodes * self.per_node if self.nodes else None


def split_overrides(overrides: list[str]) -> tuple[list[str], str | None]:
    """The recipe's overrides, and the cluster file that one of them names."""
    files = [item.removeprefix(CLUSTER) for item in overrides if item.startswith(CLUSTER)]
    return [item for item in overrides if not item.startswith(CLUSTER)], files[-1] if files else None


def read_cluster(file: str | None, *, gpu: str | None = None, nodes: int | None = None) -> Cluster:
    """gpu, nodes: in place of the file's. Without a file: nodes of eight GPUs of the default kind. Raises PlatformError for a file that is none."""
    values = _values(Path(file)) if file else {}
    per_node = _count(values, "gpus_per_node", file) if "gpus_per_node" in values else 8
    named = gpu or values.get("gpu") or (DEFAULT if per_node else None)
    accelerator = _accelerator(str(named), file if gpu is None else None) if named else None
    per_node = per_node or (_count(values, "processes_per_node", file) if values.get("processes_per_node") else 1)
    network = values.get("network_gb_per_s") or NETWORK_GB_PER_S
    if not isinstance(network, int | float) or network <= 0:
        raise PlatformError(f"{file}: network_gb_per_s: expected GB/s of each GPU, found {network!r}")
    told = nodes or (_count(values, "nodes", file) if values.get("nodes") else None)
    return Cluster(accelerator, per_node, told, float(network) * 1e9, named=file or "")


def _values(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise PlatformError(f"{file}: no such cluster file; `ls configs/cluster/*.yaml` shows those that come with the project")
    try:
        values = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise PlatformError(f"{file}: no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise PlatformError(f"{file}: expected lines of the form `name: value`")
    known = (*OURS, *OF_THE_SCRIPTS)
    unknown = [str(name) for name in values if name not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        raise PlatformError(f"{file}: unknown name '{unknown[0]}'; {f'did you mean {close[0]}?' if close else 'known: ' + ', '.join(known)}")
    return values


def _count(values: dict[str, Any], name: str, file: str | None) -> int:
    value = values[name]
    if type(value) is not int or value < 0:
        raise PlatformError(f"{file}: {name}: expected a whole number, found {value!r}")
    return value


def _accelerator(name: str, file: str | None) -> Accelerator:
    if name not in ACCELERATORS:
        where = f"{file}: gpu" if file else "--gpu"
        raise PlatformError(f"{where}: '{name}' is not known; one of {', '.join(ACCELERATORS)}")
    return ACCELERATORS[name]
