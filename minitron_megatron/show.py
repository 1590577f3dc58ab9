"""`minitron show`: the resolved recipe, the architectures before and after, and what they cost."""

from __future__ import annotations

from pathlib import Path

import yaml
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from minitron_megatron.arch.architecture import (
    Architecture,
    forward_flops_per_token,
    kv_cache_bytes_per_token,
    parameter_count,
    parameters_by_part,
)
from minitron_megatron.config.checks.target import rounded_target
from minitron_megatron.config.checks.teachers import teacher_architectures
from minitron_megatron.config.notes import precision_notes
from minitron_megatron.config.schema import Recipe
from minitron_megatron.config.search import Search
from minitron_megatron.parallel.split import distillation_work, hidden_state_work, layer_works, split_layers
from minitron_megatron.results.table import short_count
from minitron_megatron.search.survey import Survey, surviving

SIZES = (
    ("layers", "layers"),
    ("hidden (embedding channels)", "hidden"),
    ("query heads", "heads"),
    ("key/value groups", "kv_groups"),
    ("head channels", "head_channels"),
    ("experts", "experts"),
    ("ffn", "ffn"),
    ("vocabulary", "vocab"),
)


def show_recipe(recipe: Recipe, source: Architecture, target: Architecture, console: Console) -> None:
    """Prints the recipe as YAML and the table of both architectures."""
    resolved = yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False, width=120)
    console.print(Syntax(resolved, "yaml", background_color="default"))
    console.print(architecture_table(source, target, recipe.distill.sequence_length))
    for note in trimming_notes(recipe, source, target):
        console.print(note)
    for note in precision_notes(recipe):
        console.print(note)
    ranks, rule = recipe.parallel.pipeline, recipe.parallel.layers_per_stage
    stages = ranks * recipe.parallel.virtual
    if stages > 1:
        works = {
            "importance": (source, hidden_state_work(source)),
            "correct": (source, distillation_work(source)),
            "distill": (target, distillation_work(target, *teacher_architectures(recipe, source))),
            "finetune": (target, distillation_work(target)),
        }
        works = {stage: work for stage, work in works.items() if getattr(recipe, stage)}
        splits = ", ".join(
            f"{stage} {' + '.join(map(str, split_layers(arch.layers, stages, rule, ends, layer_works(arch), ranks=ranks)))}"
            for stage, (arch, ends) in works.items()
        )
        console.print(f"Layers per pipeline stage ({rule}): {splits}")
    console.print(f"Artifacts: {Path(recipe.runs) / recipe.name}")


def trimming_notes(recipe: Recipe, source: Architecture, target: Architecture) -> list[str]:
    """What the table does not say: sizes that alignment changed, layers that are named, and FFNs of different widths."""
    notes = [] if recipe.search else [f"Rounded: {note}" for note in rounded_target(recipe.prune, source, recipe.fp8_multiple)[1]]
    if recipe.prune.drop_layers:
        notes.append(f"Dropped layers: {', '.join(map(str, recipe.prune.drop_layers))}")
    if recipe.prune.ffn_by == "global":
        notes.append(f"FFN neurons are ranked over all layers: {target.ffn} a layer on average, the scores decide each layer's width")
    elif target.ffn_per_layer:
        notes.append(f"FFN widths: {', '.join(map(str, target.ffn_per_layer))}")
    if recipe.prune.ffn_by == "global" or target.ffn_per_layer:
        notes.append("Exported to Hugging Face, every layer is as wide as the widest one, filled up with zeros: config.json knows one width")
    return notes


def show_search(recipe: Recipe, search: Search, source: Architecture, console: Console) -> Architecture:
    """Prints the size of the space and what each budget removes; returns the largest survivor. Raises RecipeError where there is none."""
    found = surviving(recipe, search, source)
    console.print(search_table(found))
    if search.latency and search.latency.kind == "measured":
        console.print("Latency is measured when the search runs, and may remove more.")
    smallest = min((candidate.arch for candidate in found.survivors), key=parameter_count)
    console.print(
        f"{len(found.survivors):,} of {len(found.candidates):,} candidates are left, {parameter_count(smallest):,} to "
        f"{parameter_count(found.largest):,} parameters. Below, `after` is the largest of them; the search chooses."
    )
    return found.largest


def search_table(found: Survey) -> Table:
    """How many candidates each budget misses, and how many it is the first to remove."""
    table = Table(title=f"Space of {len(found.candidates):,} candidates", title_justify="left")
    for header, justify in (("budget", "left"), ("limit", "left"), ("outside of it", "right"), ("removed by it first", "right")):
        table.add_column(header, justify=justify)  # type: ignore[arg-type]  # rich names them by literals
    if found.impossible:
        table.add_row("shape", "a model, no larger than the source", f"{found.impossible:,}", "not counted")
    for name, limit, misses, first in found.removals():
        table.add_row(name, limit, f"{misses:,}", f"{first:,}")
    return table


def architecture_table(source: Architecture, target: Architecture, sequence_length: int) -> Table:
    """Before and after, with parameters by part, FLOPs and KV-cache bytes per token."""
    table = Table(title=f"{source.family_name}: before and after", title_justify="left")
    table.add_column("")
    for header in ("before", "after", "ratio"):
        table.add_column(header, justify="right")
    for label, field in SIZES:
        if getattr(source, field):
            _row(table, label, getattr(source, field), getattr(target, field))
    table.add_section()
    after = parameters_by_part(target)
    for part, before in parameters_by_part(source).items():
        label = f"{part} (tied)" if part == "output" and source.tied_embeddings else part
        _row(table, f"parameters: {label}", before, after[part])
    _row(table, "parameters: all", parameter_count(source), parameter_count(target), style="bold")
    table.add_row("", *(short_count(parameter_count(arch)) for arch in (source, target)), "", style="bold")
    table.add_section()
    flops = [forward_flops_per_token(arch, sequence_length) for arch in (source, target)]
    _row(table, f"forward FLOPs per token (sequence {sequence_length})", flops[0], flops[1])
    _row(table, "KV-cache bytes per token (bf16)", kv_cache_bytes_per_token(source), kv_cache_bytes_per_token(target))
    return table


def _row(table: Table, label: str, before: int, after: int, style: str = "") -> None:
    ratio = f"{after / before:.3f}" if before else "–"
    table.add_row(label, f"{before:,}", f"{after:,}", ratio if before != after else "=", style=style)
