"""Cluster files, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_megatron.errors import LayoutError, PlatformError
from minitron_megatron.plan.cluster import Cluster, read_cluster, split_overrides
from minitron_megatron.plan.command import on_all_nodes

RECIPE = "configs/smollm2_135m_to_97m.yaml"


def test_the_file_is_no_override_of_the_recipe() -> None:
    assert split_overrides(["distill.steps=3", "cluster=a.yaml"]) == (["distill.steps=3"], "a.yaml")
    assert split_overrides(["distill.steps=3"]) == (["distill.steps=3"], None)


def test_what_the_scripts_read_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("partition:   # none\ngpus_per_node: 4\ngpu: H200-141GB\nnodes: 3\nnetwork_gb_per_s: 25\nenvironment: NCCL_DEBUG=INFO\n")
    cluster = read_cluster(str(file))
    assert cluster.gpu is not None and cluster.gpu.name == "H200-141GB"
    assert (cluster.per_node, cluster.processes, cluster.network_bytes_per_second) == (4, 12, 25e9)
    assert read_cluster(str(file), gpu="A100-80GB", nodes=1).processes == 4


def test_without_gpus_memory_is_that_of_processes(tmp_path: Path) -> None:
    file = tmp_path / "cpu.yaml"
    file.write_text("gpus_per_node: 0\nprocesses_per_node: 2\n")
    cluster = read_cluster(str(file))
    assert cluster.gpu is None and cluster.per_node == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("gpu: H300\n", "gpu: 'H300' is not known; one of A100-80GB, H100-80GB"),
        ("gpus_per_nod: 8\n", "unknown name 'gpus_per_nod'; did you mean gpus_per_node?"),
        ("gpus_per_node: eight\n", "gpus_per_node: expected a whole number, found 'eight'"),
        ("network_gb_per_s: -1\n", "network_gb_per_s: expected GB/s of each GPU, found -1"),
        ("- 8\n", "expected lines of the form `name: value`"),
        ("a: [\n", "no valid YAML"),
    ],
)
def test_mistakes_are_told(text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(PlatformError) as raised:
        read_cluster(str(file))
    assert told in str(raised.value) and str(file) in str(raised.value)


def test_a_missing_file_is_told() -> None:
    with pytest.raises(PlatformError, match=r"nowhere\.yaml: no such cluster file"):
        read_cluster("nowhere.yaml")


def test_data_parallelism_takes_the_clusters_nodes_unless_it_is_named() -> None:
    two_nodes = Cluster(None, 8, nodes=2)
    assert on_all_nodes(RECIPE, [], two_nodes) == ["parallel.data=8"]  # over two stages
    assert on_all_nodes(RECIPE, ["parallel.data=2"], two_nodes) == ["parallel.data=2"]
    assert on_all_nodes(RECIPE, [], Cluster(None, 8)) == []  # as many nodes as the layout takes
    with pytest.raises(LayoutError, match="16 processes are no multiple of the 3"):
        on_all_nodes(RECIPE, ["parallel.pipeline=3"], two_nodes)
