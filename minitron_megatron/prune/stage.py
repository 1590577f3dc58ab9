"""Stage `prune`: width and depth together, from scores and a target architecture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from minitron_megatron.arch.architecture import Architecture, parameter_count, width_range
from minitron_megatron.arch.hf_config import hf_config_for
from minitron_megatron.artifact import Artifact, require_disk_space, write_json
from minitron_megatron.checkpoint.tensors import tensor_table
from minitron_megatron.checkpoint.torch_dist import MegatronSource
from minitron_megatron.config.checks.align import ffn_multiple
from minitron_megatron.config.checks.target import rounded_target
from minitron_megatron.config.prune import Prune
from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import ArtifactError
from minitron_megatron.parallel.world import World
from minitron_megatron.progress import byte_progress
from minitron_megatron.prune.plan import PrunePlan, make_plan
from minitron_megatron.prune.stream import apply_plan, pruned_bytes
from minitron_megatron.scores.statistics import Statistics
from minitron_megatron.scores.units import UnitScores, activation_scores, magnitude_scores, random_scores


def run(recipe: Recipe, inputs: Mapping[str, Artifact], folder: Path, world: World) -> dict[str, Any]:
    """Writes checkpoint/, plan.json and hf_config.json; the processes share the tensors."""
    original = inputs["import"]
    arch = Architecture.from_dict(original.result["architecture"])
    source = MegatronSource(original.path / "checkpoint", arch)
    plan = world.from_main(_plan(recipe, inputs, source, folder) if world.is_main else None)
    target = plan.target
    # the processes' parts are equal but for one tensor: the main one's, times their number, is what all have written
    with byte_progress("prune", pruned_bytes(source, plan), is_main=world.is_main) as on_bytes:
        group = dist.group.WORLD if world.size > 1 else None
        digest = apply_plan(source, plan, folder / "checkpoint", group, lambda count: on_bytes(count * world.size))
    if world.is_main:
        plan.save(folder / "plan.json")
        config = json.loads((original.path / "hf_config.json").read_text())
        write_json(folder / "hf_config.json", hf_config_for(config, plan.kept_layers, target))
    before, after = parameter_count(arch), parameter_count(target)
    return {
        "summary": f"{before:,} → {after:,} parameters ({after / before:.1%}), {recipe.prune.scores} scores; {_what_is_cut(plan)}",
        "architecture": target.to_dict(),
        "parameters": after,
        "parameters_before": before,
        "kept_layers": plan.kept_layers,
        "dropped_layers": plan.dropped_layers,
        "rounding": plan.rounding,
        "weights_sha256": digest,
        "ranked_by": recipe.prune.ranking.to_dict(sparse=arch.experts > 0) if recipe.prune.scores == "activation" else recipe.prune.scores,
    }


def outside_files(recipe: Recipe) -> list[Path]:
    """The scores file that is not this run's, for the artifact's id; raises ArtifactError where it is missing."""
    file = recipe.prune.scores_file
    if file is not None and not Path(file).is_file():
        raise ArtifactError(f"prune.scores_file={file}: no such file; make it with: minitron importance merge A B --output {file}")
    return [Path(file)] if file is not None else []


def _target(recipe: Recipe, inputs: Mapping[str, Artifact], source: Architecture) -> tuple[Architecture, list[str]]:
    """What the search has chosen where there is one, else the recipe's sizes; with what alignment changed of them."""
    if "search" in inputs:
        return Architecture.from_dict(json.loads((inputs["search"].path / "architecture.json").read_text())), []
    return rounded_target(recipe.prune, source, recipe.fp8_multiple)


def _plan(recipe: Recipe, inputs: Mapping[str, Artifact], source: MegatronSource, folder: Path) -> PrunePlan:
    """Made by one process: magnitude scores read the whole checkpoint, and free space is asked for before anybody writes."""
    settings, (target, rounding) = recipe.prune, _target(recipe, inputs, source.arch)
    plan = make_plan(
        _scores(settings, inputs, source),
        source.arch,
        target,
        dropped_layers=inputs["depth"].result["dropped_layers"] if "depth" in inputs else settings.drop_layers,
        global_ffn_multiple=ffn_multiple(settings, recipe.fp8_multiple) if settings.ffn_by == "global" else None,
        head_residual=settings.head_residual,
        rounding=rounding,
    )
    require_disk_space(folder, pruned_bytes(source, plan), "the pruned checkpoint")
    return plan


def _scores(settings: Prune, inputs: Mapping[str, Artifact], source: MegatronSource) -> UnitScores:
    if settings.scores == "random":
        return random_scores(source.arch, settings.seed)
    if settings.scores == "magnitude":
        return magnitude_scores(((row, source.read(row)) for row in tensor_table(source.arch)), source.arch)
    path = Path(settings.scores_file) if settings.scores_file else inputs["importance"].path / "scores.safetensors"
    statistics = Statistics.load(path)
    if statistics.origin.get("model") != inputs["import"].result["weights_sha256"]:
        raise ArtifactError(f"{path} was measured on another model than {inputs['import'].path}; make it anew with: minitron importance RECIPE")
    return activation_scores(statistics, settings.ranking)


def _what_is_cut(plan: PrunePlan) -> str:
    source, target = plan.source, plan.target
    sizes = [(name, getattr(source, name), getattr(target, name)) for name in ("layers", "hidden", "kv_groups", "heads", "experts")]
    sizes.append(("ffn", width_range(source), width_range(target)))
    cut = ", ".join(f"{name} {before} → {after}" for name, before, after in sizes if before != after) or "nothing is cut"
    return "; ".join([cut, *(f"rounded: {note}" for note in plan.rounding)])
