"""Scores against naive computations from raw activations and raw weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.arch.source import source_architecture
from minitron_megatron.checkpoint.huggingface import HuggingFaceSource
from minitron_megatron.checkpoint.tensors import TensorRow, tensor_table
from minitron_megatron.config.criteria import Aggregations, Criteria, Ranking
from minitron_megatron.config.importance import ImportanceAggregation
from minitron_megatron.errors import ArtifactError
from minitron_megatron.importance.accumulate import BlockSums
from minitron_megatron.importance.reduce import fold
from minitron_megatron.importance.token_sums import token_sums
from minitron_megatron.scores.statistics import INFLUENCE, Statistics, over_samples
from minitron_megatron.scores.units import UnitScores, activation_scores, block_influence, head_scores, magnitude_scores, random_scores

ARCH = Architecture("llama", 2, 6, 8, 2, 4, 10, 131, False, 64, 1e-6, 10000.0)
WIDTHS = {
    "ffn": ARCH.ffn,
    "ffn_before_activation": ARCH.ffn,
    "heads": ARCH.heads * ARCH.head_channels,
    "attention_norm": ARCH.hidden,
    "mlp_norm": ARCH.hidden,
    "final_norm": ARCH.hidden,
    "head_contributions": ARCH.heads,
}
P1 = Criteria(ffn="before_activation", heads="per_token_norm", channels="all_norms")
P1_HEADS = Criteria(heads="per_token_norm")
BEHIND = Criteria(heads="behind_projection")
OLD_AXES = ("ffn", "heads", "attention_norm", "mlp_norm", "influence")
SAMPLES, TOKENS = 37, 11
# away from zero, so that the variance of x, of |x| and the mean square are three different things
NAIVE_TOKENS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.abs().mean(0),
    "l2": lambda x: x.pow(2).sum(0).sqrt(),
    "variance": lambda x: x.var(0, correction=0),
}
NAIVE_SAMPLES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda a: a.mean(0),
    "l2": lambda a: a.pow(2).sum(0).sqrt(),
    "variance": lambda a: a.var(0, correction=0),
}


def activations(layer: int, axis: str) -> Tensor:
    """[samples, tokens, units] fp64, of values that fp32 holds; head_norms: of the heads' own, head by head."""
    if axis == "head_norms":
        x = activations(layer, "heads")
        return torch.stack([x[:, :, head * 4 : head * 4 + 4].pow(2).sum(-1).sqrt() for head in range(ARCH.heads)], dim=-1)
    generator = torch.Generator().manual_seed(hash((layer, len(axis))) % 1000)
    return (torch.randn(SAMPLES, TOKENS, WIDTHS[axis], generator=generator) + 0.5).double()


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    """Through the accumulators as the stage uses them, in micro-batches of 2 that do not divide the samples."""
    sums = BlockSums()
    for layer in range(ARCH.layers):
        for axis in seen_in(layer):
            x = activations(layer, axis)
            for start in range(0, SAMPLES, 2):
                ids = list(range(start, min(start + 2, SAMPLES)))
                sums.add({(layer, axis): token_sums(x[ids].transpose(0, 1))}, TOKENS, ids)
        cosines = torch.linspace(-1, 1, SAMPLES) / (layer + 1)
        sums.add_influence({(layer, "influence"): cosines * TOKENS}, TOKENS, list(range(SAMPLES)))
    return Statistics(ARCH, SAMPLES, fold({}, sums.blocks), {"model": "x"})


def seen_in(layer: int) -> list[str]:
    return [axis for axis in (*WIDTHS, "head_norms") if axis != "final_norm" or layer == ARCH.layers - 1]


def naive(layer: int, axis: str, *, batch: str, sequence: str) -> Tensor:
    per_sample = torch.stack([NAIVE_TOKENS[sequence](sample) for sample in activations(layer, axis)])
    return NAIVE_SAMPLES[batch](per_sample)


@pytest.mark.parametrize("sequence", NAIVE_TOKENS)
@pytest.mark.parametrize("batch", NAIVE_SAMPLES)
def test_all_nine_aggregations_are_what_raw_activations_give(batch: str, sequence: str, statistics: Statistics) -> None:
    pair = ImportanceAggregation(batch=batch, sequence=sequence)  # type: ignore[arg-type]
    scores, by_p1 = activation_scores(statistics, Ranking(pair)), activation_scores(statistics, Ranking(pair, criteria=P1))

    # token sums are fp32 (11 terms: 1e-6 relative); a variance over samples is a small difference of larger numbers
    tolerance = {"rtol": 1e-4 if batch == "variance" else 2e-6, "atol": 1e-6}
    for layer in range(ARCH.layers):
        torch.testing.assert_close(scores.ffn[layer], naive(layer, "ffn", batch=batch, sequence=sequence), **tolerance)
        channels = naive(layer, "heads", batch=batch, sequence=sequence)
        heads = torch.stack([channels[head * 4 : head * 4 + 4].pow(2).sum().sqrt() for head in range(ARCH.heads)])
        torch.testing.assert_close(scores.heads[layer], heads, **tolerance)
        of_groups = torch.stack([heads[:4].pow(2).sum().sqrt(), heads[4:].pow(2).sum().sqrt()])  # 4 heads in each of 2 groups
        torch.testing.assert_close(scores.kv_groups[layer], of_groups, **tolerance)
        torch.testing.assert_close(by_p1.ffn[layer], naive(layer, "ffn_before_activation", batch=batch, sequence=sequence), **tolerance)
        heads = naive(layer, "head_norms", batch=batch, sequence=sequence)
        torch.testing.assert_close(by_p1.heads[layer], heads, **tolerance)
        behind = activation_scores(statistics, Ranking(pair, criteria=BEHIND)).heads[layer]
        torch.testing.assert_close(behind, naive(layer, "head_contributions", batch=batch, sequence=sequence), **tolerance)
        of_groups = torch.stack([heads[:4].pow(2).sum().sqrt(), heads[4:].pow(2).sum().sqrt()])
        torch.testing.assert_close(by_p1.kv_groups[layer], of_groups, **tolerance)
    norms = [naive(layer, axis, batch=batch, sequence=sequence) for layer in range(2) for axis in ("attention_norm", "mlp_norm")]
    torch.testing.assert_close(scores.channels, norms[0] + norms[1] + norms[2] + norms[3], **tolerance)
    final = naive(1, "final_norm", batch=batch, sequence=sequence)
    torch.testing.assert_close(by_p1.channels, norms[0] + norms[1] + norms[2] + norms[3] + final, **tolerance)
    assert scores.channels.dtype == scores.ffn[0].dtype == torch.float64


def test_each_axis_is_aggregated_in_its_own_way_and_what_is_not_named_in_the_common_one(statistics: Statistics) -> None:
    own = Aggregations.model_validate({"heads": {"batch": "mean"}, "channels": {"batch": "variance", "sequence": "l2"}})
    scores = activation_scores(statistics, Ranking(ImportanceAggregation(batch="l2", sequence="variance"), own))
    for axis, (batch, sequence) in {"ffn": ("l2", "variance"), "heads": ("mean", "variance"), "channels": ("variance", "l2")}.items():
        alike = activation_scores(statistics, Ranking(ImportanceAggregation(batch=batch, sequence=sequence)))  # type: ignore[arg-type]
        assert torch.equal(torch.stack([*getattr(scores, axis)]), torch.stack([*getattr(alike, axis)])), axis
    alike = activation_scores(statistics, Ranking(ImportanceAggregation(batch="mean", sequence="variance")))
    assert all(torch.equal(a, b) for a, b in zip(scores.kv_groups, alike.kv_groups, strict=True))  # groups go with their heads


def test_the_two_scores_of_a_head_rank_differently() -> None:
    """One head's channels take turns, the other's are all a little: a norm at each token sees the first as large, a mean by channel does not."""
    arch = Architecture("llama", 1, 6, 2, 1, 4, 10, 131, False, 64, 1e-6, 10000.0)
    turns, steady = torch.eye(4).repeat(2, 1), torch.full((8, 4), 0.3)  # [tokens, channels]
    sums, x = BlockSums(), torch.cat([turns, steady], dim=-1)[:, None]
    for axis, seen in (("heads", x), ("head_norms", x.unflatten(-1, (2, 4)).norm(dim=-1))):
        sums.add({(0, axis): token_sums(seen)}, 8, [0])
    for axis, width in {"ffn": 10, "attention_norm": 6, "mlp_norm": 6}.items():
        sums.add({(0, axis): token_sums(torch.zeros(8, 1, width))}, 8, [0])
    sums.add_influence({(0, INFLUENCE): torch.zeros(1)}, 8, [0])
    statistics = Statistics(arch, 1, fold({}, sums.blocks))
    by_channel, by_token = activation_scores(statistics).heads[0], activation_scores(statistics, Ranking(criteria=P1_HEADS)).heads[0]
    torch.testing.assert_close(by_channel, torch.tensor([0.5, 0.6]).double())  # 4 channels of a mean of 1/4, and of 0.3
    torch.testing.assert_close(by_token, torch.tensor([1.0, 0.6]).double())


def test_a_file_that_lacks_what_a_criterion_reads_says_so(statistics: Statistics) -> None:
    older = replace(statistics, sums={key: value for key, value in statistics.sums.items() if key[1] in OLD_AXES})
    assert torch.equal(activation_scores(older).channels, activation_scores(statistics).channels)
    read_by = {
        "ffn_before_activation": Criteria(ffn=P1.ffn),
        "head_norms": P1_HEADS,
        "head_contributions": BEHIND,
        "final_norm": Criteria(channels=P1.channels),
    }
    for lacks, criteria in read_by.items():
        with pytest.raises(ArtifactError, match=f"lacks {lacks} of layer . of this model; make it anew with: minitron importance RECIPE"):
            activation_scores(older, Ranking(criteria=criteria))


def test_the_nine_aggregations_are_nine_different_scores(statistics: Statistics) -> None:
    found = [over_samples(statistics.sums[0, "ffn"], SAMPLES, sequence=s, batch=b) for s in NAIVE_TOKENS for b in NAIVE_SAMPLES]
    assert all(not torch.allclose(a, b, rtol=1e-3) for i, a in enumerate(found) for b in found[:i])


def test_a_constant_unit_has_no_variance_and_no_nan() -> None:
    """Rounding makes Σa²/N − (Σa/N)² negative; its root or its rank would be nonsense."""
    value = 0.1 + 1e-9
    sums = torch.tensor([[[value * 1024], [value * value * 1024]]] * 3, dtype=torch.float64)
    sums[:, 1] *= 1 - 1e-15
    assert over_samples(sums, 1024, sequence="mean", batch="variance").item() == 0.0


def test_block_influence_is_one_minus_the_mean_cosine(statistics: Statistics) -> None:
    expected = torch.stack([1 - torch.linspace(-1, 1, SAMPLES).double().mean() / (layer + 1) for layer in range(2)])
    torch.testing.assert_close(block_influence(statistics), expected, rtol=0, atol=1e-7)  # cosines are fp32


def test_channels_of_a_head_are_consecutive() -> None:
    channels = torch.zeros(ARCH.heads * ARCH.head_channels, dtype=torch.float64)
    channels[4:8] = torch.tensor([1.0, 2.0, 2.0, 4.0])
    assert head_scores(channels, ARCH).tolist() == [0, 5, 0, 0, 0, 0, 0, 0]


def test_random_scores_are_the_same_for_the_same_seed_and_others_for_another() -> None:
    first, again, other = random_scores(ARCH, 7), random_scores(ARCH, 7), random_scores(ARCH, 8)
    for name in ("channels", "layers"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    for name in ("ffn", "heads", "kv_groups"):
        for a, b, c in zip(getattr(first, name), getattr(again, name), getattr(other, name), strict=True):
            assert torch.equal(a, b) and not torch.equal(a, c)
    assert not torch.equal(first.ffn[0], first.ffn[1])
    sizes = ([len(row) for row in first.ffn], [len(row) for row in first.heads], len(first.channels), len(first.layers))
    assert sizes == ([10, 10], [8, 8], 6, 2) and [len(row) for row in first.kv_groups] == [2, 2]


def test_a_seed_draws_the_scores_that_it_always_drew() -> None:
    """Runs with the random baseline can be made anew: an axis that is added later is drawn last."""
    generator = torch.Generator().manual_seed(7)
    drawn = torch.rand(2 * 10 + 2 * 8 + 6 + 2, generator=generator, dtype=torch.float64)
    scores = random_scores(ARCH, 7)
    assert torch.equal(torch.cat([*scores.ffn, *scores.heads, scores.channels, scores.layers]), drawn)


def test_random_scores_leave_torchs_own_generator_alone() -> None:
    before = torch.get_rng_state()
    random_scores(ARCH, 7)
    assert torch.equal(torch.get_rng_state(), before)


def norm(*parts: Tensor) -> Tensor:
    return torch.stack([part.double().pow(2).sum() for part in parts]).sum().sqrt()


def check_expert_magnitudes(own: dict[str, Tensor], scores: UnitScores, arch: Architecture, layer: int) -> None:
    """own: Hugging Face's tensors of a layer; an expert goes with its row of the router."""
    router = next(tensor for name, tensor in own.items() if name.endswith(".gate.weight"))
    for expert in range(arch.experts):
        parts = {name.split(".")[-2]: tensor for name, tensor in own.items() if f".experts.{expert}." in name}
        gate, up, down = (parts.get(old, parts.get(new)) for old, new in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")))
        assert gate is not None and up is not None and down is not None
        torch.testing.assert_close(scores.experts[layer][expert], norm(gate, up, down, router[expert]), rtol=1e-5, atol=0)
        neurons = torch.stack([norm(gate[i], up[i], down[:, i]) for i in range(arch.ffn)])
        torch.testing.assert_close(scores.expert_ffn[layer][expert], neurons, rtol=1e-5, atol=0)


def test_magnitudes_are_norms_over_all_weights_that_go_with_a_unit(
    every_family: Path,
) -> None:
    """From Hugging Face's own tensors, unit by unit; heads 0–3 belong to group 0, whose key and value stay."""
    from safetensors.torch import load_file

    arch, tensors = source_architecture(str(every_family)), load_file(every_family / "model.safetensors")
    if arch.family_name == "nemotron":  # whose norms multiply by 1 + weight
        tensors = {name: tensor + 1 if name.endswith("norm.weight") else tensor for name, tensor in tensors.items()}
    source = HuggingFaceSource(every_family, arch)
    scores = magnitude_scores(((row, source.read(row)) for row in tensor_table(arch)), arch)

    width = arch.head_channels
    for layer in range(arch.layers):
        own = {name.split(f"layers.{layer}.")[1]: tensor for name, tensor in tensors.items() if f"layers.{layer}." in name}
        if arch.experts:
            check_expert_magnitudes(own, scores, arch, layer)
        else:
            first = [own[name] for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight") if name in own]  # nemotron has no gate
            ffn = [norm(*(matrix[i] for matrix in first), own["mlp.down_proj.weight"][:, i]) for i in range(arch.ffn)]
            torch.testing.assert_close(scores.ffn[layer], torch.stack(ffn), rtol=1e-5, atol=0)
        heads = []
        for head in range(arch.heads):
            rows = slice(head * width, (head + 1) * width)
            parts = [own["self_attn.q_proj.weight"][rows], own["self_attn.o_proj.weight"][:, rows]]
            parts += [own["self_attn.q_proj.bias"][rows]] if arch.family.qkv_bias else []
            heads.append(norm(*parts))
        per_group, groups = arch.heads // arch.kv_groups, []
        for group in range(arch.kv_groups):
            ours, its_heads = slice(group * width, (group + 1) * width), slice(group * per_group * width, (group + 1) * per_group * width)
            parts = [own[f"self_attn.{x}_proj.{kind}"][ours] for x in "kv" for kind in ("weight", "bias") if kind == "weight" or arch.family.qkv_bias]
            parts += [own["self_attn.q_proj.weight"][its_heads], own["self_attn.o_proj.weight"][:, its_heads]]
            parts += [own["self_attn.q_proj.bias"][its_heads]] if arch.family.qkv_bias else []
            groups.append(norm(*parts))
        torch.testing.assert_close(scores.kv_groups[layer], torch.stack(groups), rtol=1e-5, atol=0)
        # fp32 squares of up to 131 × 40 weights
        torch.testing.assert_close(scores.heads[layer], torch.stack(heads), rtol=1e-5, atol=0)
        torch.testing.assert_close(scores.layers[layer], norm(*own.values()), rtol=1e-5, atol=0)
    channels = []
    for channel in range(arch.hidden):
        parts = []
        for name, tensor in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight")):  # these write into the residual stream: rows
                parts.append(tensor[channel])
            elif tensor.dim() == 2:
                parts.append(tensor[:, channel])
            elif name.endswith(("layernorm.weight", "model.norm.weight", "layernorm.bias", "model.norm.bias")):
                parts.append(tensor[channel])
        channels.append(norm(*parts))
    torch.testing.assert_close(scores.channels, torch.stack(channels), rtol=1e-5, atol=0)


def test_magnitudes_of_an_ffn_without_a_gate_take_both_of_its_matrices() -> None:
    first, second = torch.randn(10, 6, generator=torch.Generator().manual_seed(1)), torch.randn(6, 10, generator=torch.Generator().manual_seed(2))
    rows = [(TensorRow("fc1", ("up",), ("F", "D"), 1), first), (TensorRow("fc2", ("down",), ("D", "F"), 1), second)]
    expected = torch.stack([norm(first[i], second[:, i]) for i in range(10)])
    torch.testing.assert_close(magnitude_scores(rows, ARCH).ffn[1], expected, rtol=1e-6, atol=0)


def test_statistics_come_back_from_disk_bit_by_bit(statistics: Statistics, tmp_path: Path) -> None:
    statistics.save(tmp_path / "scores.safetensors")
    back = Statistics.load(tmp_path / "scores.safetensors")
    assert (back.arch, back.samples, back.origin) == (statistics.arch, statistics.samples, statistics.origin)
    assert back.sums.keys() == statistics.sums.keys()
    assert all(torch.equal(back.sums[key], statistics.sums[key]) for key in back.sums)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.9])
def test_a_truncated_scores_file_names_the_command(kept: float, statistics: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    statistics.save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(ArtifactError, match="make it anew with: minitron importance RECIPE"):
        Statistics.load(path)


def test_a_file_that_is_missing_or_of_another_kind_names_the_command(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    headers = {"foreign": "no json", "list": "[]", "empty": "{}", "later": '{"architecture": {"new": 1}, "samples": 1, "origin": {}}'}
    for name, header in headers.items():
        save_file({"layers.0.ffn": torch.ones(1)}, tmp_path / f"{name}.safetensors", metadata={"statistics": header})
    for name in ("missing", "other", *headers):
        with pytest.raises(ArtifactError, match="no whole scores file"):
            Statistics.load(tmp_path / f"{name}.safetensors")
