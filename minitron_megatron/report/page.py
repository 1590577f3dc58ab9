"""What the page says, as plain values for template.html; it reads no files of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from minitron_megatron.arch.architecture import Architecture, kv_cache_bytes_per_token, parameter_count, parameters_by_part
from minitron_megatron.evaluate import table
from minitron_megatron.report import figures

STAGES = ("import", "data", "importance", "prune", "distill", "evaluate", "export", "report")


@dataclass(frozen=True)
class RunData:
    """A run as read from its artifacts; None or empty where a stage has not been run."""

    recipe: dict[str, Any]
    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    """plan.json of the stage prune."""
    importance: dict[str, Any] | None = None
    """summary.json of the stage importance."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """metrics.jsonl of the stage distill."""
    evaluation: dict[str, Any] | None = None
    """result.json of the stage evaluate."""

    @property
    def shapes(self) -> tuple[Architecture, Architecture] | None:
        """Source and target."""
        if self.plan is None:
            return None
        return Architecture.from_dict(self.plan["source"]), Architecture.from_dict(self.plan["target"])

    @property
    def dropped_layers(self) -> list[int]:
        """Global numbers, in the source, of the layers that pruning dropped."""
        if self.plan is None:
            return []
        return sorted(set(range(self.plan["source"]["layers"])) - set(self.plan["kept_layers"]))

    def kept_of(self, kind: str) -> list[int | None]:
        """Units of a kind ("ffn", "heads") kept in each source layer, None where the layer is dropped."""
        if self.plan is None:
            return []
        kept, layers = self.plan[kind], set(self.plan["kept_layers"])
        return [len(kept[str(layer)]) if layer in layers else None for layer in range(self.plan["source"]["layers"])]


@dataclass(frozen=True)
class Figure:
    """An inline SVG with its caption, or the sentence that says why it is not there."""

    title: str
    caption: str
    svg: Markup | None = None
    missing: str = ""


def render_page(run: RunData) -> str:
    """The HTML of the report; everything is inside it, nothing is fetched."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("template.html").render(
        name=run.recipe["name"],
        finished=max((str(manifest.get("finished", "")) for manifest in run.manifests.values()), default="")[:10],
        summary=summary_sentence(run),
        tiles=_tiles(run),
        model_names=table.model_names(run.evaluation) if run.evaluation else [],
        rows=table.rows(run.evaluation) if run.evaluation else [],
        table_note=table.note(run.evaluation) if run.evaluation else "",
        training_figures=_training_figures(run),
        importance_figures=_importance_figures(run),
        cut_figure=_cut_figure(run),
        shape_rows=_shape_rows(run),
        layer_rows=_layer_rows(run),
        prompt=(run.evaluation or {}).get("prompt", ""),
        continuations=_continuations(run),
        recipe_yaml=yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True, width=110),
        stages=[(name, run.manifests[name]) for name in STAGES if name in run.manifests],
        versions=_versions(run),
        commands=[f"minitron {name} recipe.yaml" for name in STAGES],
    )


def summary_sentence(run: RunData) -> str:
    """What was cut, parameters before and after, and what distillation brought back, in one sentence."""
    if run.shapes is None:
        return "Nothing has been pruned yet: the stage prune is missing."
    source, target = run.shapes
    cuts = [f"{label} {before:,} → {after:,}" for label, before, after in _sizes(source, target) if before != after]
    before, after = parameter_count(source), parameter_count(target)
    text = f"{' and '.join([', '.join(cuts[:-1]), cuts[-1]] if len(cuts) > 1 else cuts) or 'Nothing cut'}: "
    text += f"{table.millions(before)} → {table.millions(after)} parameters ({table.change(after, before)})"
    kl = _pair(run, "kl")
    if kl:
        text += f"; distillation brought the KL to the teacher from {kl[0]} to {kl[1]} nats/token on held-out text"
    return text[0].upper() + text[1:] + "."


def _sizes(source: Architecture, target: Architecture) -> list[tuple[str, int, int]]:
    fields = (("FFN neurons", "ffn"), ("query heads", "heads"), ("embedding channels", "hidden"), ("layers", "layers"))
    return [(label, getattr(source, name), getattr(target, name)) for label, name in fields]


def _pair(run: RunData, key: str) -> tuple[str, str] | None:
    """A figure in domain of the pruned and of the distilled model, three significant digits."""
    models = (run.evaluation or {}).get("models", {})
    found = [(models.get(name, {}).get("domains", {}).get("in_domain", {}).get(key) or {}).get("value") for name in ("pruned", "distilled")]
    return None if None in found else (table.significant(found[0], 3), table.significant(found[1], 3))


def _tiles(run: RunData) -> list[dict[str, str]]:
    """The few numbers that a reader takes away: label, value, and what it is to be compared with."""
    tiles = []
    if run.shapes:
        before, after = (parameter_count(arch) for arch in run.shapes)
        tiles.append({"label": "Parameters", "value": table.millions(after), "note": f"{table.change(after, before)} from {table.millions(before)}"})
    for key, label in (("kl", "KL to the teacher"), ("perplexity", "Perplexity, held out")):
        pair = _pair(run, key)
        if pair:
            tiles.append({"label": label, "value": pair[1], "note": f"after pruning {pair[0]}{_teacher_note(run, key)}"})
    models = (run.evaluation or {}).get("models", {})
    speeds = [models.get(name, {}).get("tokens_per_second") for name in ("distilled", "teacher")]
    if all(speeds):
        tiles.append({"label": "Forward speed", "value": f"{speeds[0] / speeds[1]:.2f}×", "note": f"{table.significant(speeds[0], 3)} tokens/s"})
    return tiles


def _teacher_note(run: RunData, key: str) -> str:
    figure = (run.evaluation or {})["models"].get("teacher", {}).get("domains", {}).get("in_domain", {}).get(key)
    return f", teacher {table.significant(figure['value'], 3)}" if figure else ", in nats/token"


def _training_figures(run: RunData) -> list[Figure]:
    missing = "" if run.steps else "The training curves are left out: the stage distill has no metrics."
    return [
        _figure("KL to the teacher", "Forward KL of each step and on validation samples; below, the learning rate.",
                lambda: figures.kl_curve(run.steps), missing),
        _figure("Perplexity", "On validation samples; below, the gradient norm of each step.",
                lambda: figures.perplexity_curve(run.steps), missing),
    ]  # fmt: skip


def _importance_figures(run: RunData) -> list[Figure]:
    scores, missing = run.importance or {}, "" if run.importance else "The importance figures are left out: the stage importance has no summary."
    layers = len(scores.get("ffn", []))
    kinds = [("ffn", "FFN neuron")] + ([("heads", "query head")] if run.shapes and run.shapes[0].heads != run.shapes[1].heads else [])
    made = [
        _figure(f"Importance of each {unit}", f"One row per layer, its {unit}s sorted by score and divided by the layer's largest.",
                _heatmap(scores.get(kind, []), run.kept_of(kind) or [len(row) for row in scores.get(kind, [])], unit), missing)
        for kind, unit in kinds
    ]  # fmt: skip
    made.append(
        _figure("Block Influence", f"1 − cosine of what enters and leaves a layer; low means that it changes little. {layers or ''} layers.".replace("  ", " "),
                lambda: figures.block_influence_bars(scores["block_influence"], run.dropped_layers), missing)
    )  # fmt: skip
    return made


def _heatmap(scores_LF: list[list[float]], kept_L: list[int | None], unit: str) -> Callable[[], str]:
    return lambda: figures.importance_heatmap([np.asarray(row) for row in scores_LF], kept_L, unit=unit)


def _cut_figure(run: RunData) -> Figure:
    def draw() -> str:
        source = Architecture.from_dict((run.plan or {})["source"])
        kinds = [figures.Kept("FFN neurons", source.ffn, run.kept_of("ffn")), figures.Kept("query heads", source.heads, run.kept_of("heads"))]
        return figures.kept_strips(kinds)

    missing = "" if run.plan else "What was cut is left out: the stage prune has no plan."
    return _figure("Layer by layer", "The share of each layer that is kept.", draw, missing)


def _figure(title: str, caption: str, draw: Callable[[], str], missing: str) -> Figure:
    if missing:
        return Figure(title, caption, missing=missing)
    return Figure(title, caption, svg=Markup(draw()))  # our own SVG; matplotlib escapes its texts


def _shape_rows(run: RunData) -> list[tuple[str, str, str, str]]:
    """Sizes and parameters of each part, before, after and by how much less."""
    if run.shapes is None:
        return []
    source, target = run.shapes
    plain = [("Layers", "layers"), ("Embedding channels", "hidden"), ("FFN neurons", "ffn"), ("Query heads", "heads"), ("Key/value groups", "kv_groups")]
    pairs = [(label, getattr(source, name), getattr(target, name), "{:,}".format) for label, name in plain]
    before, after = parameters_by_part(source), parameters_by_part(target)
    pairs += [(f"Parameters: {part}", before[part], after[part], table.millions) for part in before if before[part]]
    pairs += [("Parameters", parameter_count(source), parameter_count(target), table.millions)]
    pairs += [("KV cache per token (bf16)", kv_cache_bytes_per_token(source), kv_cache_bytes_per_token(target), lambda size: f"{size / 1024:.1f} KiB")]
    return [(label, show(old), show(new), table.change(new, old) if new != old else "") for label, old, new, show in pairs]


def _layer_rows(run: RunData) -> list[tuple[int, int | None, str, str]]:
    """Source layer, its number after pruning (None: dropped), FFN kept/total, heads kept/total."""
    if run.plan is None:
        return []
    source, kept_layers = run.plan["source"], list(run.plan["kept_layers"])
    counts = zip(run.kept_of("ffn"), run.kept_of("heads"), strict=True)
    return [
        (layer, kept_layers.index(layer) if layer in kept_layers else None, f"{ffn or 0:,}/{source['ffn']:,}", f"{heads or 0}/{source['heads']}")
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
