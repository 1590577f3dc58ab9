"""One plan cuts the same bits in 1, 2 and 3 processes, out of whatever wrote the source; megatron loads the result under any layout."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint import read_ahead
from minitron_megatron.checkpoint.sharded import chunk_state, load_model, save_state
from minitron_megatron.checkpoint.tensors import TensorRow, tensor_table
from minitron_megatron.checkpoint.torch_dist import MegatronSource, TorchDistReader, weights_digest, write_torch_dist
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import ArtifactError, CheckpointError, MinitronError
from minitron_megatron.model.build import build_model
from minitron_megatron.parallel.layout import global_layout
from minitron_megatron.parallel.world import World
from minitron_megatron.prune.plan import PrunePlan, make_plan
from minitron_megatron.prune.stream import apply_plan
from minitron_megatron.scores.units import UnitScores, group_scores, random_scores

from .conftest import Identical
from .house import copy_of, publish_stage, recipe_for
from .pool import Pool, WorkerError
from .test_checkpoints import load_run_save
from .tiny import LLAMA, ONE, PP2, PP2_EVEN, QWEN2_TIED, QWEN3, TP2, TP2_PP2, TP2_SP, layout_name, read_all, write_random

PADDED = 192
PLAIN = {"self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight", "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight"}
TIED_LLAMA = replace(LLAMA, tied_embeddings=True)
SHAPES = {"llama": LLAMA, "llama_tied": TIED_LLAMA, "qwen2_tied": QWEN2_TIED, "qwen3": QWEN3}

Style = tuple[Parallel, bool, bool, bool]
"""Layout that wrote the source, stacked [L, …] keys, plain norm names, padded vocabulary."""
STYLES: dict[str, Style] = {
    "tp2": (TP2_SP, False, False, False),
    "pp2_uneven": (PP2, False, False, False),
    "tp2_pp2": (TP2_PP2, False, False, False),
    "stacked_padded": (ONE, True, False, True),
    "plain": (ONE, False, True, False),
    "stacked_plain_padded_tp2_pp2": (TP2_PP2, True, True, True),
}
IDENTITY = [("llama", "tp2"), ("llama_tied", "stacked_plain_padded_tp2_pp2"), ("qwen2_tied", "stacked_padded"), ("qwen3", "plain")]


def write_as(world: World, style: Style, arch: Architecture, source: Path, target: Path) -> None:
    """The weights of source, by megatron's own model and writer, in another style of keys."""
    parallel, stacked, plain, padded = style
    layout = global_layout(parallel, world)
    model = build_model(arch.resized(vocab=PADDED) if padded else arch, layout, world.platform, torch.float32)
    load_model(model, source)
    [chunk] = model.chunks
    if padded:
        dirty_padding(chunk, layout.tensor_rank)
    state = chunk_state(chunk) if not stacked else chunk.sharded_state_dict(metadata={"dp_cp_group": layout.groups.dp_cp})
    for entry in state.values():
        if plain and isinstance(entry, ShardedTensor):
            for fused, own in PLAIN.items():
                entry.key = entry.key.replace(fused, own)
    if world.is_main:
        target.mkdir()
    world.barrier()
    save_state(state, target)


def dirty_padding(model: Any, tensor_rank: int) -> None:
    """Rows beyond the vocabulary, which training never leaves at zero."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and name.startswith(("embedding", "output_layer")):
                weight[max(0, LLAMA.vocab - tensor_rank * len(weight)) :] = 77.0


def prune_here(world: World, source: Path, plan: PrunePlan, target: Path) -> str:
    return apply_plan(MegatronSource(source, plan.source), plan, target, dist.group.WORLD)


def cut_by_hand(tensors: dict[str, Tensor], plan: PrunePlan) -> dict[str, Tensor]:
    """The same cut with numpy, rows of the fused QKV weight as [group, query… key value, channel]; llama's tensors only."""
    arch, channels = plan.source, plan.channels
    found = {}
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        found[name] = tensors[name].numpy()[:, channels]
    found["decoder.final_layernorm.weight"] = tensors["decoder.final_layernorm.weight"].numpy()[channels]
    for ours, layer in enumerate(plan.kept_layers):
        old = {name.split(f".{layer}.", 1)[1]: x.numpy() for name, x in tensors.items() if name.startswith(f"decoder.layers.{layer}.")}
        per_group = arch.heads // arch.kv_groups
        groups = plan.kv_groups[layer]
        kept = np.array(plan.heads[layer]).reshape(len(groups), -1) % per_group
        qkv = old["self_attention.linear_qkv.weight"].reshape(arch.kv_groups, per_group + 2, arch.head_channels, arch.hidden).copy()
        for head, pruned in plan.head_residual.get(layer, {}).items():
            group = head // per_group
            qkv[group, head % per_group] += qkv[group, head % per_group] - qkv[group, pruned % per_group]
        chosen = [np.concatenate([qkv[group, kept[place]], qkv[group, per_group:]]) for place, group in enumerate(groups)]
        proj = old["self_attention.linear_proj.weight"].reshape(arch.hidden, arch.heads, arch.head_channels)
        gate, up = np.split(old["mlp.linear_fc1.weight"], 2)
        new = {
            "self_attention.linear_qkv.layer_norm_weight": old["self_attention.linear_qkv.layer_norm_weight"][channels],
            "self_attention.linear_qkv.weight": np.stack(chosen).reshape(-1, arch.hidden)[:, channels],
            "self_attention.linear_proj.weight": proj[:, plan.heads[layer]].reshape(arch.hidden, -1)[channels],
            "mlp.linear_fc1.layer_norm_weight": old["mlp.linear_fc1.layer_norm_weight"][channels],
            "mlp.linear_fc1.weight": np.concatenate([gate[plan.ffn[layer]], up[plan.ffn[layer]]])[:, channels],
            "mlp.linear_fc2.weight": old["mlp.linear_fc2.weight"][channels][:, plan.ffn[layer]],
        }
        found |= {f"decoder.layers.{ours}.{name}": x for name, x in new.items()}
    return {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in found.items()}


@pytest.fixture(scope="module")
def plan() -> PrunePlan:
    target = LLAMA.resized(layers=3, hidden=16, ffn=28, heads=4)
    return make_plan(random_scores(LLAMA, 3), LLAMA, target)


def unlike_layers() -> UnitScores:
    """In later layers fewer neurons hold more of the layer's sum."""
    scores = random_scores(LLAMA, 3)
    groups = [group_scores(scores_H, LLAMA) for scores_H in scores.heads]
    return replace(scores, ffn=[of_layer ** (1 + layer) for layer, of_layer in enumerate(scores.ffn)], kv_groups=groups)


@pytest.fixture(scope="module")
def trimmed() -> PrunePlan:
    """Given layers, one of two groups with three of its four heads, widths of layers ranked together, and the residual of the fourth head."""
    target = LLAMA.resized(layers=3, hidden=16, ffn=20, kv_groups=1, heads=3)
    plan = make_plan(unlike_layers(), LLAMA, target, dropped_layers=[1, 2], global_ffn_multiple=2, head_residual=True)
    assert len(set(plan.target.ffn_widths)) == 3
    assert len({tuple(groups) for groups in plan.kv_groups.values()}) == 2  # not the same group in all layers
    return plan


@pytest.fixture(scope="module")
def sources(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """sources(shape, style): a checkpoint, written once; style `ours` is what the stages write."""
    folder = tmp_path_factory.mktemp("sources")

    def source(shape: str, style: str) -> Path:
        path = folder / f"{shape}-{style}"
        if not path.exists() and style == "ours":
            write_random(path, SHAPES[shape])
        elif not path.exists():
            pool.run(write_as, STYLES[style], SHAPES[shape], source(shape, "ours"), path, processes=STYLES[style][0].processes)
        return path

    return source


@pytest.fixture(scope="module")
def expected(sources: Callable[[str, str], Path], plan: PrunePlan) -> dict[str, Tensor]:
    return cut_by_hand(read_all(sources("llama", "ours"), LLAMA), plan)


@pytest.mark.parametrize("style", ["ours", *STYLES])
def test_the_cut_is_the_same_bits_for_every_source_and_number_of_processes(
    pool: Pool, sources: Callable[[str, str], Path], plan: PrunePlan, expected: dict[str, Tensor], tmp_path: Path, identical: Identical, style: str
) -> None:
    digests = set()
    for processes in (1, 2, 3):
        target = tmp_path / str(processes)
        told = pool.run(prune_here, sources("llama", style), plan, target, processes=processes)
        digests |= {*told, weights_digest(MegatronSource(target, plan.target))}
        assert len(list(target.glob("*.distcp"))) == processes
        found = read_all(target, plan.target)
        assert found.keys() == expected.keys()
        same = all(found[name].equal(expected[name]) for name in expected)
        assert identical("pruned weights, as cut by hand, in 1, 2 and 3 processes", f"source {style}", same)
    assert len(digests) == 1


@pytest.mark.parametrize("style", ["ours", "tp2_pp2", "stacked_plain_padded_tp2_pp2"])
def test_every_kind_of_trimming_is_the_same_bits_for_every_source_and_number_of_processes(
    pool: Pool, sources: Callable[[str, str], Path], trimmed: PrunePlan, tmp_path: Path, identical: Identical, style: str
) -> None:
    expected, digests = cut_by_hand(read_all(sources("llama", "ours"), LLAMA), trimmed), set()
    for processes in (1, 3):
        target = tmp_path / str(processes)
        digests |= {*pool.run(prune_here, sources("llama", style), trimmed, target, processes=processes)}
        found = read_all(target, trimmed.target)
        assert found.keys() == expected.keys()
        same = all(found[name].equal(expected[name]) for name in expected)
        assert identical("groups, widths of layers and residuals, as cut by hand, in 1 and 3 processes", f"source {style}", same)
    assert len(digests) == 1


def test_the_sources_are_what_they_are_called(sources: Callable[[str, str], Path]) -> None:
    """Otherwise the test above compares one kind of source with itself."""
    keys = {style: TorchDistReader(sources("llama", style)).tensors for style in STYLES}
    for style, (parallel, stacked, plain, padded) in STYLES.items():
        middle = "layers." if stacked else "layers.2."
        assert ("decoder." + middle + "input_layernorm.weight" in keys[style]) == plain
        assert ("decoder." + middle + "self_attention.linear_qkv.layer_norm_weight" in keys[style]) != plain
        rows = keys[style]["embedding.word_embeddings.weight"].size[0]
        assert rows == (PADDED if padded else LLAMA.vocab + LLAMA.vocab % parallel.tensor)
    assert len(keys["tp2"]["decoder.layers.2.mlp.linear_fc2.weight"].chunks) == 2


@pytest.mark.parametrize("parallel", [TP2, PP2_EVEN], ids=layout_name)
def test_megatron_loads_what_three_processes_wrote(
    pool: Pool, sources: Callable[[str, str], Path], plan: PrunePlan, tmp_path: Path, parallel: Parallel
) -> None:
    digest = pool.run(prune_here, sources("llama", "ours"), plan, tmp_path / "pruned", processes=3)[0]
    pool.run(load_run_save, parallel, plan.target, tmp_path / "pruned", tmp_path / "back", processes=parallel.processes)
    assert weights_digest(MegatronSource(tmp_path / "back", plan.target)) == digest


def test_megatron_loads_layers_of_different_widths_under_every_layout(pool: Pool, sources: Callable[[str, str], Path], tmp_path: Path) -> None:
    """One group belongs to one tensor rank: both groups stay here."""
    both = make_plan(unlike_layers(), LLAMA, LLAMA.resized(layers=3, ffn=20), global_ffn_multiple=2)
    assert both.target.ffn_per_layer
    digest = pool.run(prune_here, sources("llama", "ours"), both, tmp_path / "pruned", processes=3)[0]
    for parallel in (TP2_PP2, PP2_EVEN):
        back = tmp_path / layout_name(parallel)
        pool.run(load_run_save, parallel, both.target, tmp_path / "pruned", back, processes=parallel.processes)
        assert weights_digest(MegatronSource(back, both.target)) == digest


@pytest.mark.parametrize(("shape", "style"), IDENTITY)
def test_the_identity_plan_changes_no_bit(pool: Pool, sources: Callable[[str, str], Path], tmp_path: Path, shape: str, style: str) -> None:
    arch = SHAPES[shape]
    ours = sources(shape, "ours")
    plan = make_plan(random_scores(arch, 5), arch, arch)
    digests = pool.run(prune_here, sources(shape, style), plan, tmp_path / "same", processes=2)
    assert set(digests) == {weights_digest(MegatronSource(ours, arch))}
    before, after = read_all(ours, arch), read_all(tmp_path / "same", arch)
    assert all(after[name].equal(before[name]) for name in before)
    assert TorchDistReader(tmp_path / "same").tensors.keys() == TorchDistReader(ours).tensors.keys()


def most_alive(world: World, folder: Path) -> int:
    """The most tensors of a stream that lived at the same time: each one's memory is a numpy array, which can be watched."""
    alive: set[int] = set()
    most = 0

    def read(row: TensorRow) -> Tensor:
        nonlocal most
        array = np.zeros(row.shape(LLAMA), dtype=np.float32)
        alive.add(id(array))
        weakref.finalize(array, alive.discard, id(array))
        most = max(most, len(alive))
        return torch.from_numpy(array)

    ahead, read_ahead.AHEAD_BYTES = read_ahead.AHEAD_BYTES, 1
    try:
        write_torch_dist(folder, tensor_table(LLAMA), LLAMA, dtype=lambda row: torch.float32, read=read, group=dist.group.WORLD)
    finally:
        read_ahead.AHEAD_BYTES = ahead
    return most


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stream_holds_four_tensors_at_most(pool: Pool, tmp_path: Path, processes: int) -> None:
    """With the shortest way ahead: one that is read, one on its way to the file, one whose digest is made and one that is being let go."""
    assert max(pool.run(most_alive, tmp_path / "stream", processes=processes)) <= 4


def prune_and_tell(world: World, source: Path, plan: PrunePlan, target: Path) -> tuple[str, str]:
    try:
        return "none", prune_here(world, source, plan, target)
    except MinitronError as error:
        return type(error).__name__, str(error)


def test_a_disk_that_is_full_under_one_process_ends_all_with_one_line(
    pool: Pool, sources: Callable[[str, str], Path], plan: PrunePlan, tmp_path: Path
) -> None:
    target = tmp_path / "pruned"
    target.mkdir()
    (target / "__1_0.distcp").symlink_to("/dev/full")
    told = pool.run(prune_and_tell, sources("llama", "ours"), plan, target, processes=3, timeout_seconds=20)
    assert len(set(told)) == 1
    kind, message = told[0]
    assert kind == ArtifactError.__name__ and "\n" not in message
    assert "__1_0.distcp: cannot be written (No space left on device)" in message
    assert not (target / ".metadata").exists()  # without it this is no checkpoint


def test_a_truncated_shard_that_one_process_meets_ends_all_with_one_line(
    pool: Pool, sources: Callable[[str, str], Path], plan: PrunePlan, tmp_path: Path
) -> None:
    """Of three shards one is cut at its end, where the last tensors of one process are."""
    source = tmp_path / "source"
    pool.run(prune_here, sources("llama", "ours"), make_plan(random_scores(LLAMA, 0), LLAMA, LLAMA), source, processes=3)
    shard = source / "__2_0.distcp"
    shard.write_bytes(shard.read_bytes()[: int(shard.stat().st_size * 0.9)])
    told = pool.run(prune_and_tell, source, plan, tmp_path / "pruned", processes=2, timeout_seconds=20)
    assert len(set(told)) == 1
    kind, message = told[0]
    assert kind == CheckpointError.__name__ and "\n" not in message
    assert "cannot be read" in message and "make the checkpoint anew" in message
    assert not (tmp_path / "pruned" / ".metadata").exists()


def publish_and_tell(world: World, recipe: Recipe) -> str:
    try:
        publish_stage(world, "prune", recipe)
    except MinitronError as error:
        return str(error)
    return "published"


def test_a_stage_that_fails_leaves_nothing_of_its_own(pool: Pool, house: Path, tmp_path: Path) -> None:
    runs = copy_of(house, tmp_path / "runs")
    shutil.rmtree(runs / "tiny" / "prune")
    (shard,) = (runs / "tiny" / "import" / "checkpoint").glob("*.distcp")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: int(len(whole) * 0.9)])
    told = pool.run(publish_and_tell, recipe_for(runs), processes=2, timeout_seconds=20)
    assert len(set(told)) == 1 and "make the checkpoint anew" in told[0]
    assert not [path for path in (runs / "tiny").iterdir() if "prune" in path.name]
    shard.write_bytes(whole)
    assert pool.run(publish_and_tell, recipe_for(runs), processes=2) == ["published"] * 2


def break_in_rank_1(world: World, folder: Path) -> None:
    def read(row: TensorRow) -> Tensor:
        if world.rank == 1:
            raise ValueError("a defect of ours")
        return torch.zeros(row.shape(LLAMA))

    write_torch_dist(folder, tensor_table(LLAMA), LLAMA, dtype=lambda row: torch.float32, read=read, group=dist.group.WORLD)


def test_a_defect_keeps_its_traceback(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"(?s)in read.*ValueError: a defect of ours"):
        pool.run(break_in_rank_1, tmp_path / "stream", processes=2, timeout_seconds=20)
