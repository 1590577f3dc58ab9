"""One checkpoint under every layout: the same states and logits, and the same weights when it is written back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.sharded import load_model, model_state, save_state, set_model_state
from minitron_megatron.checkpoint.torch_dist import MegatronSource, TorchDistReader, weights_digest
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.data.batches import Batch, collate
from minitron_megatron.model.build import build_model
from minitron_megatron.model.run import forward_only
from minitron_megatron.model.sequence import whole_sequence
from minitron_megatron.parallel.layout import global_layout
from minitron_megatron.parallel.world import World
from minitron_megatron.training.output_layer import DistillationOutputLayer

from .conftest import Record
from .plain_model import PlainModel
from .pool import Pool, WorkerError
from .tiny import (
    DP2,
    LLAMA,
    ONE,
    PP2,
    PP2_EVEN,
    QWEN2_TIED,
    QWEN3,
    TP2,
    TP2_PP2,
    TP2_SP,
    RandomSamples,
    layout_name,
    name_of,
    relative_difference,
    write_random,
)

SAMPLES = 3
PP2_LISTED = Parallel(pipeline=2, layers_per_stage=[1, 4])
SHAPES = {"llama": LLAMA, "qwen2_tied": QWEN2_TIED, "qwen3": QWEN3}
CASES = [
    *[("llama", layout) for layout in (ONE, TP2, TP2_SP, PP2, PP2_EVEN)],
    *[("qwen2_tied", layout) for layout in (ONE, TP2_SP, PP2_EVEN, DP2, TP2_PP2)],
    *[("qwen3", layout) for layout in (ONE, TP2_SP)],
]


def load_run_save(world: World, parallel: Parallel, arch: Architecture, source: Path, target: Path) -> tuple[Tensor, Tensor] | None:
    """Loads a student, runs it forward, writes it back; (hidden [B, S, D], logits [B, S, V]) where both are whole."""
    layout = global_layout(parallel, world)
    model = build_model(arch, layout, world.platform, torch.float32, output_layer=DistillationOutputLayer, trainable=True)
    load_model(model, source)

    def logits(hidden: Tensor, _: Batch) -> tuple[Tensor, Tensor]:
        whole = whole_sequence(hidden, layout)
        weight = model.output_weight()[: model.valid_rows()]  # type: ignore[index]
        return whole.transpose(0, 1), (whole @ weight.T).transpose(0, 1)

    samples = RandomSamples(SAMPLES)
    found = forward_only(model, [collate(samples, range(SAMPLES))], consume=logits)
    if world.is_main:
        target.mkdir()
    world.barrier()
    save_state(model_state(model), target)
    return (found[0][0].clone(), found[0][1].clone()) if found else None


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: (folder / name, write_random(folder / name, arch)) for name, arch in SHAPES.items()}


@pytest.mark.parametrize(("shape", "parallel"), CASES, ids=name_of)
def test_a_layout_gives_the_states_of_one_plain_model_and_writes_the_same_weights(
    pool: Pool, measured: Record, checkpoints: dict[str, tuple[Path, str]], tmp_path: Path, shape: str, parallel: Parallel
) -> None:
    arch, (source, digest) = SHAPES[shape], checkpoints[shape]
    answers = pool.run(load_run_save, parallel, arch, source, tmp_path / "back", processes=parallel.processes)
    found = [answer for answer in answers if answer is not None]
    plain = PlainModel(source, arch)
    tokens = RandomSamples(SAMPLES).tokens[:, :-1]
    with torch.no_grad():
        hidden, logits = plain.hidden(tokens), plain.logits(tokens)
    # tensor ranks hold neighbouring rows of the vocabulary; data-parallel ranks hold copies
    whole = torch.cat([answer[1] for answer in found[: parallel.tensor]], dim=-1)
    differences = [relative_difference(answer[0], hidden) for answer in found] + [relative_difference(whole, logits)]
    assert measured("states against plain fp64", layout_name(parallel), max(differences)) <= 1e-5  # fp32 against fp64
    assert weights_digest(MegatronSource(tmp_path / "back", arch)) == digest


def test_a_student_checkpoint_holds_the_tables_tensors_and_nothing_else(pool: Pool, checkpoints: dict[str, tuple[Path, str]], tmp_path: Path) -> None:
    """Names in the source, written without megatron, against those that megatron writes from two stages."""
    source, _ = checkpoints["qwen2_tied"]
    pool.run(load_run_save, PP2, QWEN2_TIED, source, tmp_path / "back", processes=2)
    assert TorchDistReader(tmp_path / "back").tensors.keys() == TorchDistReader(source).tensors.keys()


def load_by_layers(world: World, parallel: Parallel, arch: Architecture, source: Path, layers: int) -> bool:
    """Whether loading a few layers at a time gives the weights that loading all at once gives."""
    layout = global_layout(parallel, world)
    whole, parts = (build_model(arch, layout, world.platform, torch.float32) for _ in range(2))
    load_model(whole, source)
    load_model(parts, source, layers_at_a_time=layers)
    return all(torch.equal(one, other) for one, other in zip(whole.parameters(), parts.parameters(), strict=True))


@pytest.mark.parametrize(("parallel", "layers"), [(PP2_LISTED, 1), (PP2_LISTED, 3), (TP2, 2)], ids=name_of)
def test_a_model_is_the_same_loaded_a_few_layers_at_a_time(
    pool: Pool, checkpoints: dict[str, tuple[Path, str]], parallel: Parallel, layers: int
) -> None:
    """With one layer on one stage and four on the other, the first stage has nothing to read any more while the other still has."""
    assert all(pool.run(load_by_layers, parallel, LLAMA, checkpoints["llama"][0], layers, processes=2))


def load_without_a_layer(world: World, source: Path) -> None:
    model = build_model(LLAMA, global_layout(ONE, world), world.platform, torch.float32)
    state = model_state(model)
    del state["model0"]["decoder.final_layernorm.weight"]
    set_model_state(model, dist_checkpointing.load(state, str(source)))


def test_a_weight_that_no_part_brings_is_an_error(pool: Pool, checkpoints: dict[str, tuple[Path, str]]) -> None:
    with pytest.raises(WorkerError, match=r"lacks 1 weights of the model, such as decoder.final_layernorm.weight; make it anew"):
        pool.run(load_without_a_layer, checkpoints["llama"][0], processes=1)
