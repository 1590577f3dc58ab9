"""The independent reference: a decoder written with plain torch in fp64, from the table's weights, without megatron.

Legend: B batch, S sequence, D hidden, H heads, G key/value groups, K head channels, F ffn, V vocabulary, n tokens,
E experts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.tensors import tensor_table
from minitron_megatron.checkpoint.torch_dist import MegatronSource
from minitron_megatron.distill.hidden.map import Term


class PlainModel:
    """Weights by the table's names; `seen` collects what the importance hooks should see, [B, S, units] by (layer, axis).

    `states`: [B, S, D] hidden states with their graph, by ("layer", number) and ("embedding",). `residuals`: [B, S, D] what enters each
    layer, and what leaves the last.
    """

    def __init__(self, folder: Path, arch: Architecture) -> None:
        source = MegatronSource(folder, arch)
        self.arch = arch
        self.weights = {row.name: source.read(row).double().requires_grad_() for row in tensor_table(arch)}
        self.seen: dict[tuple[int, str], Tensor] = {}
        self.states: dict[tuple[str | int, ...], Tensor] = {}
        self.residuals: list[Tensor] = []

    def hidden(self, tokens_BS: Tensor) -> Tensor:
        """[B, S, D] after the final norm."""
        x = self.weights["embedding.word_embeddings.weight"][tokens_BS]
        self.states["embedding",], self.residuals = x, [x.detach()]
        for layer in range(self.arch.layers):
            before = x
            normed = self.states["layer", layer] = self._norm(f"decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight", x)
            x = x + self._attention(layer, normed)
            x = x + self._after_attention(layer, x)
            product = (before * x).sum(-1) / (before.norm(dim=-1) * x.norm(dim=-1))
            self.seen[layer, "influence"] = product.detach()
            self.residuals.append(x.detach())
        final = self._norm("decoder.final_layernorm.weight", x)
        self.seen[self.arch.layers - 1, "final_norm"] = final.detach()
        return final

    def logits(self, tokens_BS: Tensor) -> Tensor:
        """[B, S, V]"""
        name = "embedding.word_embeddings.weight" if self.arch.tied_embeddings else "output_layer.weight"
        return self.hidden(tokens_BS) @ self.weights[name].T

    def _norm(self, name: str, x: Tensor) -> Tensor:
        if self.arch.family_name == "nemotron":
            centred = x - x.mean(-1, keepdim=True)
            unit = centred / (centred.square().mean(-1, keepdim=True) + self.arch.norm_eps).sqrt()
            scaled = unit * (1 + self.weights[name]) + self.weights[name.removesuffix("weight") + "bias"]
        else:
            scaled = x / (x.square().mean(-1, keepdim=True) + self.arch.norm_eps).sqrt() * self.weights[name]
        layer = name.split(".")[2]
        axes = (("linear_qkv.layer_norm", "attention_norm"), ("linear_fc1.layer_norm", "mlp_norm"), ("pre_mlp_layernorm", "mlp_norm"))
        for part, axis in axes:
            if part in name:
                self.seen[int(layer), axis] = scaled.detach()
        return scaled

    def _attention(self, layer: int, x: Tensor) -> Tensor:
        arch, ours = self.arch, f"decoder.layers.{layer}.self_attention"
        B, S, _ = x.shape
        G, K, per_group = arch.kv_groups, arch.head_channels, arch.heads // arch.kv_groups
        fused = x @ self.weights[f"{ours}.linear_qkv.weight"].T
        if f"{ours}.linear_qkv.bias" in self.weights:
            fused = fused + self.weights[f"{ours}.linear_qkv.bias"]
        # rows of a group: its queries, its key, its value
        grouped = fused.view(B, S, G, per_group + 2, K)
        query, key, value = grouped[..., :per_group, :], grouped[..., per_group : per_group + 1, :], grouped[..., per_group + 1 :, :]
        if f"{ours}.q_layernorm.weight" in self.weights:
            query, key = self._norm(f"{ours}.q_layernorm.weight", query), self._norm(f"{ours}.k_layernorm.weight", key)
        query, key = self._rotate(query), self._rotate(key)
        score = torch.einsum("bsghk,btgik->bghst", query, key) / math.sqrt(K)
        future = torch.ones(S, S, dtype=torch.bool).triu(1)
        weight = score.masked_fill(future, -math.inf).softmax(-1)
        context = torch.einsum("bghst,btgik->bsghk", weight, value).reshape(B, S, arch.heads * K)
        self.seen[layer, "heads"] = context.detach()
        norms = [head.norm(dim=-1) for head in context.detach().split(K, dim=-1)]
        self.seen[layer, "head_norms"] = torch.stack(norms, dim=-1)
        projection = self.weights[f"{ours}.linear_proj.weight"]
        added = [head @ part.T for head, part in zip(context.detach().split(K, dim=-1), projection.split(K, dim=-1), strict=True)]
        self.seen[layer, "head_contributions"] = torch.stack([part.norm(dim=-1) for part in added], dim=-1)
        return context @ projection.T

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding of [B, S, G, heads, K], first half against second half of the channels that turn."""
        turned = int(self.arch.head_channels * self.arch.rotary_share)
        x, still = x[..., :turned], x[..., turned:]
        half = turned // 2
        frequency = self.arch.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
        angle = torch.outer(torch.arange(x.shape[1], dtype=torch.float64), frequency)[None, :, None, None, :]
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin(), still], dim=-1)

    def _after_attention(self, layer: int, x: Tensor) -> Tensor:
        if self.arch.experts:
            return self._experts(layer, self._norm(f"decoder.layers.{layer}.pre_mlp_layernorm.weight", x))
        return self._mlp(layer, self._norm(f"decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight", x))

    def _experts(self, layer: int, x: Tensor) -> Tensor:
        """Every expert for every token, times its router weight, which is 0 for those that were not chosen."""
        ours = f"decoder.layers.{layer}.mlp"
        logits_BSE = x @ self.weights[f"{ours}.router.weight"].T
        lowest_chosen = logits_BSE.topk(self.arch.experts_per_token).values[..., -1:]
        shares_BSE = torch.where(logits_BSE >= lowest_chosen, logits_BSE.softmax(-1), 0.0)
        weights_BSE = shares_BSE / shares_BSE.sum(-1, keepdim=True) if self.arch.normalised_routing else shares_BSE
        inner, outputs = [], []
        for expert in range(self.arch.experts):
            name = f"{ours}.experts.experts.{expert}"
            gate, up = (x @ self.weights[f"{name}.linear_fc1.weight"].T).chunk(2, dim=-1)
            inner.append(gate * torch.sigmoid(gate) * up * weights_BSE[..., expert : expert + 1])
            outputs.append(inner[-1] @ self.weights[f"{name}.linear_fc2.weight"].T)
        self.seen[layer, "expert_ffn"] = torch.cat(inner, dim=-1).detach()
        self.seen[layer, "experts"] = torch.stack([output.norm(dim=-1) for output in outputs], dim=-1).detach()
        return torch.stack(outputs).sum(0)

    def _mlp(self, layer: int, x: Tensor) -> Tensor:
        ours = f"decoder.layers.{layer}.mlp"
        first = x @ self.weights[f"{ours}.linear_fc1.weight"].T
        if self.arch.family_name == "nemotron":
            gate = first
            inner = first.clamp_min(0).square()
        else:
            gate, up = first.chunk(2, dim=-1)
            inner = gate * torch.sigmoid(gate) * up
        self.seen[layer, "ffn"], self.seen[layer, "ffn_before_activation"] = inner.detach(), gate.detach()
        return inner @ self.weights[f"{ours}.linear_fc2.weight"].T


def kd_loss(student: PlainModel, teacher: PlainModel, tokens_BS: Tensor, weights_BS: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum over tokens of weight · T² · KL(teacher ‖ student), from whole logits."""
    with torch.no_grad():
        target = (teacher.logits(tokens_BS) / temperature).log_softmax(-1)
    own = (student.logits(tokens_BS) / temperature).log_softmax(-1)
    return (torch.nn.functional.kl_div(own, target, reduction="none", log_target=True).sum(-1) * weights_BS).sum() * temperature**2


def cross_entropy(student: PlainModel, tokens_BS: Tensor, labels_BS: Tensor, weights_BS: Tensor) -> Tensor:
    losses = torch.nn.functional.cross_entropy(student.logits(tokens_BS).flatten(0, 1), labels_BS.flatten(), reduction="none")
    return (losses * weights_BS.flatten()).sum()


def hidden_loss(student: PlainModel, teacher: PlainModel, term: Term, projection_ED: Tensor, kind: str, weights_BS: Tensor) -> Tensor:
    """Sum over tokens of weight · (1 − cosine), or of weight · mean squared difference, of the states of the models' last tokens."""
    ours, theirs = student.states[term.student] @ projection_ED.T, teacher.states[term.teacher].detach()
    cosine = (ours * theirs).sum(-1) / (ours.norm(dim=-1) * theirs.norm(dim=-1))
    losses_BS = 1 - cosine if kind == "cosine" else (ours - theirs).pow(2).sum(-1) / projection_ED.shape[0]
    return (losses_BS * weights_BS).sum()


def naive_statistics(model: PlainModel, tokens_NS: Tensor) -> dict[tuple[int, str], Tensor]:
    """One sample after another: Σ and Σ² over samples of mean |x|, L2 norm and variance over its tokens."""
    sums: dict[tuple[int, str], Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    for tokens_S in tokens_NS:
        with torch.no_grad():
            model.hidden(tokens_S[None])
        for key, seen in model.seen.items():
            x = seen[0]
            if key[1] == "influence":
                sums[key] = sums[key] + torch.stack([x.mean(), x.mean().square()])
                continue
            of_sample = torch.stack([x.abs().mean(0), x.norm(dim=0), x.var(0, unbiased=False)])
            sums[key] = sums[key] + torch.stack([of_sample, of_sample.square()], dim=1)
    return dict(sums)
