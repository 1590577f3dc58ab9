"""Stage `search`: enumerate, filter, shortlist, train the shortlist shortly, choose (arXiv 2407.14679, section 2.4).

One process directs; the candidates are pruned and trained by jobs of their own, so every layout works and each candidate continues by itself.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.artifact import Artifact, write_json
from minitron_megatron.config.schema import Recipe
from minitron_megatron.config.search import Search
from minitron_megatron.errors import ArtifactError, RecipeError
from minitron_megatron.model.precision import torch_dtype
from minitron_megatron.platform import activate
from minitron_megatron.results.pareto import pareto_svg, ranking_markdown
from minitron_megatron.results.svg import standalone
from minitron_megatron.scores.statistics import Statistics
from minitron_megatron.scores.units import activation_scores
from minitron_megatron.search.halving import successive_halving
from minitron_megatron.search.jobs import Place, places, run_chains
from minitron_megatron.search.latency import LatencyModel
from minitron_megatron.search.measure import Measured, measure
from minitron_megatron.search.ranking import ranking_of
from minitron_megatron.search.shortlist import KeptImportance, KeptParameters, choose_diverse
from minitron_megatron.search.space import AXES
from minitron_megatron.search.survey import Candidate, Survey, require_survivors, survey
from minitron_megatron.search.trials import Trial, make_trials, write_recipe


def run(recipe: Recipe, inputs: Mapping[str, Artifact], folder: Path) -> dict[str, Any]:
    """Writes architecture.json (what prune takes), ranking.json, table.md, pareto.svg and candidates.csv; candidates/ holds their runs."""
    search = recipe.search
    if search is None:
        raise RecipeError("search: the recipe has no section 'search'")
    source = Architecture.from_dict(inputs["import"].result["architecture"])
    where = places(search.jobs, recipe.parallel.processes, platform=recipe.platform)  # ahead of what is measured: it may refuse
    found, shortlist = _surveyed(recipe, search, source, inputs, folder)
    _tell(found, shortlist)
    trials = make_trials(shortlist, inputs, folder / "candidates")
    _train(trials, recipe, search, where)
    ranking = ranking_of(trials, rank_by=search.rank_by, rounds=search.short_distillation.rounds)
    chosen = next(trial for trial in trials if trial.name == ranking["chosen"])
    write_json(folder / "ranking.json", ranking)
    write_json(folder / "architecture.json", chosen.candidate.arch.to_dict())
    (folder / "table.md").write_text(ranking_markdown(ranking))
    (folder / "pareto.svg").write_text(standalone(pareto_svg(ranking)))
    for trial in trials:
        trial.clear()
    for other in {path.name for path in (folder / "candidates").iterdir()} - {trial.name for trial in trials}:
        shutil.rmtree(folder / "candidates" / other)  # of a start with another shortlist
    told = ranking["candidates"][0]["losses"][str(search.short_distillation.rounds[-1])][search.rank_by]
    return {
        "summary": f"{len(found.candidates):,} candidates, {len(found.survivors):,} within the budgets, {len(shortlist)} trained; "
        f"{chosen.name}: {search.rank_by} {told['value']:.3f} ± {told['stderr']:.3f} after {search.short_distillation.rounds[-1]} steps",
        "architecture": chosen.candidate.arch.to_dict(),
        "candidates": len(found.candidates),
        "survivors": len(found.survivors),
        "shortlist": [trial.name for trial in trials],
        "removed": [{"budget": name, "limit": limit, "miss": misses, "removed": first} for name, limit, misses, first in found.removals()],
        "chosen": chosen.name,
        "not_told_apart": [item["name"] for item in ranking["candidates"] if item["verdict"] == "not told apart"],
    }


def outside_files(recipe: Recipe) -> list[Path]:
    """The scores file that is not this run's, for the artifact's id; raises ArtifactError where it is missing."""
    file = recipe.prune.scores_file
    if file is not None and not Path(file).is_file():
        raise ArtifactError(f"prune.scores_file={file}: no such file; make it with: minitron importance merge A B --output {file}")
    return [Path(file)] if file is not None else []


def _surveyed(recipe: Recipe, search: Search, source: Architecture, inputs: Mapping[str, Artifact], folder: Path) -> tuple[Survey, list[Candidate]]:
    """All candidates, and the shortlist; both written to candidates.csv."""
    found = survey(recipe, search, source, _latency(recipe, search, source, folder))
    require_survivors(found)
    proxy = _proxy(recipe, inputs, source)
    kept = [proxy(candidate.arch) for candidate in found.survivors]
    places_of = choose_diverse([candidate.arch for candidate in found.survivors], kept, count=search.shortlist, pool=search.pool)
    shortlist = [found.survivors[place] for place in places_of]
    _write_candidates(folder / "candidates.csv", found, {id(item): share for item, share in zip(found.survivors, kept, strict=True)}, shortlist)
    return found, shortlist


def _latency(recipe: Recipe, search: Search, source: Architecture, folder: Path) -> LatencyModel | None:
    """Measured once: a continued search must not filter by other times."""
    request, file = search.latency, folder / "latency.json"
    if request is None or request.kind != "measured":
        return None
    if file.is_file():
        return Measured.from_dict(json.loads(file.read_text()), request)
    fitting = survey(recipe, search, source)
    require_survivors(fitting)
    shapes = list({item.arch.resized(layers=1): None for item in fitting.survivors})
    proxy = KeptParameters(source)
    chosen = [shapes[place] for place in choose_diverse(shapes, [proxy(arch) for arch in shapes], count=request.shapes)]
    print(f"search: measuring {len(chosen)} shapes on this machine", flush=True)
    found = measure(chosen, request, activate(recipe.platform), torch_dtype(recipe.precision))
    write_json(file, found.to_dict())
    for name in ("prompt", "token", "output"):
        fit = getattr(found, name)
        rest = f", {fit.left_out:.1%} for shapes left out" if fit.left_out is not None else ""
        print(f"search: fitted {name} times miss the measured ones by {fit.residual:.1%} (root mean square){rest}", flush=True)
    return found


def _proxy(recipe: Recipe, inputs: Mapping[str, Artifact], source: Architecture) -> KeptImportance | KeptParameters:
    """By the scores that pruning will use; where they are none of activations, larger is taken for better."""
    if recipe.prune.scores != "activation":
        return KeptParameters(source)
    path = Path(recipe.prune.scores_file) if recipe.prune.scores_file else inputs["importance"].path / "scores.safetensors"
    statistics = Statistics.load(path)
    if statistics.origin.get("model") != inputs["import"].result["weights_sha256"]:
        raise ArtifactError(f"{path} was measured on another model than {inputs['import'].path}; make it anew with: minitron importance RECIPE")
    return KeptImportance(activation_scores(statistics, recipe.prune.ranking), source)


def _train(trials: Sequence[Trial], recipe: Recipe, search: Search, where: Sequence[Place]) -> None:
    """Successive halving."""
    short = search.short_distillation
    successive_halving(
        trials,
        rounds=short.rounds,
        keep=short.keep,
        train=lambda left, step: _bring_to(left, step, recipe, search, partial(run_chains, where=where)),
        loss=lambda trial, step: float(trial.losses()[step][search.rank_by].mean()),
        drop=Trial.clear,
    )


def _bring_to(trials: Sequence[Trial], step: int, recipe: Recipe, search: Search, run_jobs: Any) -> None:
    """Starts what is not there yet: of a search that was interrupted, only the rest."""
    todo = [trial for trial in trials if not trial.has(step)]
    for trial in todo:
        write_recipe(trial, recipe, search, step)
    print(f"search: {len(trials)} candidates to step {step}, {len(trials) - len(todo)} there already", flush=True)

    def finished(number: int) -> None:
        todo[number].collect()
        losses = todo[number].losses()[step]
        told = " | ".join(f"{name} {values_W.mean():.3f}" for name, values_W in losses.items())
        print(f"search: {todo[number].name} at step {step} | {told}", flush=True)

    run_jobs([trial.jobs() for trial in todo], finished=finished)


def _tell(found: Survey, shortlist: Sequence[Candidate]) -> None:
    removed = ", ".join(f"{name} removes {first:,}" for name, _, _, first in found.removals() if first)
    print(f"search: {len(found.candidates):,} candidates ({removed or 'none removed'}), {len(found.survivors):,} left", flush=True)
    print(f"search: shortlist {', '.join(candidate.name for candidate in shortlist)}", flush=True)


def _write_candidates(path: Path, found: Survey, proxy: Mapping[int, float], shortlist: Sequence[Candidate]) -> None:
    """Every candidate with its closed-form figures, what removed it, the importance it keeps and its place in the shortlist."""
    place = {id(candidate): number + 1 for number, candidate in enumerate(shortlist)}
    names = [budget.name for budget in found.budgets]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", *AXES, *names, "removed_by", "kept_importance", "shortlist"])
        for item in found.candidates:
            sizes = [getattr(item.arch, axis) for axis in AXES]
            kept = proxy.get(id(item), "")
            writer.writerow([item.name, *sizes, *(item.figures[name] for name in names), item.removed_by, kept, place.get(id(item), "")])
