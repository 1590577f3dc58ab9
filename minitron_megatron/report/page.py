"""What the page says, as plain values for template.html; it reads no files of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from minitron_megatron.arch.architecture import (
    Architecture,
    kv_cache_bytes_per_token,
    parameter_count,
    parameters_by_part,
)
from minitron_megatron.report import sections
from minitron_megatron.report.run_data import RunData
from minitron_megatron.results import table
from minitron_megatron.results.pareto import ranking_note, ranking_table

SIZES = (
    ("layers", "layers"),
    ("embedding channels", "hidden"),
    ("experts", "experts"),
    ("FFN neurons", "ffn"),
    ("query heads", "heads"),
    ("key/value groups", "kv_groups"),
)
PARTS = {"ffn": "FFN"}
ShapeRow = tuple[str, str, str, str]
"""Label, before, after, relative change."""


def render_page(run: RunData) -> str:
    """The HTML of the report; everything is inside it, nothing is fetched."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("template.html").render(
        name=run.recipe["name"],
        finished=max((str(manifest.get("finished", "")) for manifest in run.manifests.values()), default="")[:10],
        summary=summary_sentence(run),
        tiles=_tiles(run),
        model_names=table.model_names(run.evaluation) if run.evaluation else [],
        rows=table.rows(run.evaluation) if run.evaluation else [],
        table_note=table.note(run.evaluation) if run.evaluation else "",
        training_figures=sections.training_figures(run),
        importance_figures=sections.importance_figures(run),
        search_figure=sections.search_figure(run),
        search_table=ranking_table(run.ranking) if run.ranking else None,
        search_note=ranking_note(run.ranking) if run.ranking else "",
        cut_figure=sections.cut_figure(run),
        shape_rows=_shape_rows(run),
        layer_rows=_layer_rows(run),
        prompt=(run.evaluation or {}).get("prompt", ""),
        continuations=_continuations(run),
        recipe_yaml=yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True, width=110),
        stages=list(run.manifests.items()),
        versions=_versions(run),
        commands=[f"minitron {name} recipe.yaml" for name in (*run.manifests, "report")],
    )


def summary_sentence(run: RunData) -> str:
    """What was cut, parameters before and after, and what distillation brought back, in one sentence."""
    if run.shapes is None:
        return "Nothing has been pruned yet: the stage prune is missing."
    source, target = run.shapes
    before, after = parameter_count(source), parameter_count(target)
    text = f"{_cuts(source, target) or 'nothing cut'}: "
    text += f"{table.short_count(before)} → {table.short_count(after)} parameters ({table.change(after, before)})"
    kl = _pair(run, "kl")
    if kl:
        text += f"; distillation brought the KL to the teacher from {kl[0]} to {kl[1]} nats/token on held-out text"
    return f"{text[0].upper()}{text[1:]}."


def _cuts(source: Architecture, target: Architecture) -> str:
    """`layers 30 → 26 and FFN neurons 1,536 → 1,024`; empty where nothing is cut."""
    sizes = [(label, getattr(source, name), getattr(target, name)) for label, name in SIZES]
    cuts = [f"{label} {before:,} → {after:,}" for label, before, after in sizes if before != after]
    return " and ".join([part for part in (", ".join(cuts[:-1]), *cuts[-1:]) if part])


def _pair(run: RunData, key: str) -> tuple[str, str] | None:
    """A figure in domain of the pruned and of the distilled model, three significant digits."""
    pruned, distilled = _in_domain(run, "pruned", key), _in_domain(run, "distilled", key)
    if pruned is None or distilled is None:
        return None
    return table.significant(pruned, 3), table.significant(distilled, 3)


def _in_domain(run: RunData, model: str, key: str) -> float | None:
    domains = (run.evaluation or {"models": {}})["models"].get(model, {}).get("domains", {})
    return (domains.get("in_domain", {}).get(key) or {}).get("value")


def _tiles(run: RunData) -> list[dict[str, str]]:
    """The few numbers that a reader takes away: label, value, and what it is to be compared with."""
    tiles = []
    if run.shapes:
        before, after = (parameter_count(arch) for arch in run.shapes)
        tiles.append(
            {
                "label": "Parameters",
                "value": table.short_count(after),
                "note": f"{table.change(after, before)} from {table.short_count(before)}",
            }
        )
    for key, label in (("kl", "KL to the teacher"), ("perplexity", "Perplexity, held out")):
        pair = _pair(run, key)
        if pair:
            note = f"after pruning {pair[0]}{_teacher_note(run, key)}"
            tiles.append({"label": label, "value": pair[1], "note": note})
    models = (run.evaluation or {}).get("models", {})
    speeds = [models.get(name, {}).get("tokens_per_second") for name in ("distilled", "teacher")]
    if all(speeds):
        tiles.append(
            {
                "label": "Forward speed",
                "value": f"{speeds[0] / speeds[1]:.2f}×",
                "note": f"{table.significant(speeds[0], 3)} tokens/s",
            }
        )
    return tiles


def _teacher_note(run: RunData, key: str) -> str:
    teacher = _in_domain(run, "teacher", key)
    return ", in nats/token" if teacher is None else f", teacher {table.significant(teacher, 3)}"


def _shape_rows(run: RunData) -> list[ShapeRow]:
    """Sizes and parameters of each part, before, after and by how much less."""
    if run.shapes is None:
        return []
    source, target = run.shapes
    before, after = parameters_by_part(source), parameters_by_part(target)
    sizes = [_change_row(label, getattr(source, name), getattr(target, name), "{:,}".format) for label, name in SIZES if getattr(source, name)]
    used = [part for part in before if before[part]]
    parts = [_change_row(f"parameters: {PARTS.get(part, part)}", before[part], after[part]) for part in used]
    cache = kv_cache_bytes_per_token(source), kv_cache_bytes_per_token(target)
    return [
        *sizes,
        *parts,
        _change_row("Parameters", parameter_count(source), parameter_count(target)),
        _change_row("KV cache per token (bf16)", *cache, lambda size: f"{size / 1024:.1f} KiB"),
    ]


def _change_row(label: str, before: int, after: int, show: Callable[[int], str] = table.short_count) -> ShapeRow:
    change = table.change(after, before) if after != before else ""
    return label[0].upper() + label[1:], show(before), show(after), change


def _layer_rows(run: RunData) -> list[tuple[int, int | None, str, str]]:
    """Source layer, its number after pruning (None: dropped), FFN kept/total, heads kept/total."""
    if run.plan is None:
        return []
    source, kept_layers = run.plan["source"], list(run.plan["kept_layers"])
    counts = zip(run.kept_of("ffn"), run.kept_of("heads"), strict=True)
    return [
        (
            layer,
            kept_layers.index(layer) if layer in kept_layers else None,
            f"{ffn or 0:,}/{source['ffn']:,}",
            f"{heads or 0}/{source['heads']}",
        )
        for layer, (ffn, heads) in enumerate(counts)
    ]


def _continuations(run: RunData) -> list[tuple[str, str]]:
    models = (run.evaluation or {}).get("models", {})
    return [(name, model["continuation"]) for name, model in models.items() if model.get("continuation")]


def _versions(run: RunData) -> list[tuple[str, str]]:
    """Each package with its release, or with several where stages were run with different ones."""
    found: dict[str, list[str]] = {}
    for manifest in run.manifests.values():
        for package, release in manifest.get("versions", {}).items():
            found[package] = list(dict.fromkeys([*found.get(package, []), str(release)]))
    return [(package, ", ".join(releases)) for package, releases in found.items()]
