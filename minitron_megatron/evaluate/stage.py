"""Stage `evaluate`: all models in memory, the same windows, tasks and prompt for each."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from minitron_megatron.arch.architecture import Architecture, parameter_count
from minitron_megatron.artifact import Artifact
from minitron_megatron.checkpoint.sharded import load_model
from minitron_megatron.config.evaluate import Evaluate
from minitron_megatron.config.schema import Recipe
from minitron_megatron.data.batches import TokenDataset, collate
from minitron_megatron.data.samples import evaluation_windows
from minitron_megatron.data.tokenizer import Tokenizer, load_tokenizer
from minitron_megatron.evaluate.compare import compare, domain_figures
from minitron_megatron.model.build import build_model
from minitron_megatron.model.generate import generate
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.model.logits import real_logits
from minitron_megatron.model.precision import torch_dtype
from minitron_megatron.model.run import forward_only
from minitron_megatron.parallel.layout import global_layout
from minitron_megatron.parallel.world import World
from minitron_megatron.results.table import continuations, markdown_table
from minitron_megatron.tasks.accuracy import task_files_outside
from minitron_megatron.tasks.ask import accuracies_of_model
from minitron_megatron.training.given import first_teacher

STAGE_OF_STUDENT = {"pruned": "prune", "distilled": "distill", "finetuned": "finetune"}
DOMAINS = {"in_domain": "heldout", "out_of_domain": "out_of_domain"}
THROUGHPUT_WINDOWS = 4


def run(recipe: Recipe, inputs: Mapping[str, Artifact], folder: Path, world: World) -> dict[str, Any]:
    """Writes table.md; the result holds every figure with its standard error."""
    settings = recipe.evaluate
    tokenizer = load_tokenizer(recipe.data.tokenizer or inputs["import"].path / "tokenizer")
    models = _load_models(recipe, inputs, world)
    windows = _windows(settings, inputs["data"])
    figures: dict[str, dict[str, Any]] = {
        name: {"parameters": parameter_count(model.architecture), "domains": {}, "tasks": {}} for name, model in models.items()
    }
    for domain, dataset in windows.items():
        found = domain_figures(compare(models, dataset, world, what=domain), settings.sequence_length)
        for name, values in found.items():
            figures[name]["domains"][domain] = values
    for name, model in models.items():
        figures[name]["tokens_per_second"] = tokens_per_second(model, windows["in_domain"], world)
        figures[name]["tasks"] = accuracies_of_model(model, settings.tasks, items=settings.task_items, tokenizer=tokenizer, world=world)
        figures[name]["continuation"] = _continuation(model, settings, tokenizer)
    result = {
        "summary": f"held-out perplexity {_perplexities(figures, 'in_domain')} ({' / '.join(figures)})",
        "models": figures,
        "prompt": settings.prompt,
        "tokens": {domain: len(dataset) * settings.sequence_length for domain, dataset in windows.items()},
        "task_items": settings.task_items,
        "sequence_length": settings.sequence_length,
        "precision": recipe.precision,
    }
    if world.is_main:
        (folder / "table.md").write_text(f"{markdown_table(result)}\n\n{continuations(result)}\n")
    return result


def outside_files(recipe: Recipe) -> list[Path]:
    return task_files_outside(recipe.evaluate.tasks)


def tokens_per_second(model: StageModel, windows: TokenDataset, world: World) -> float:
    """Forward pass with logits over a few windows, after one that warms up; all data-parallel ranks do the same work."""
    device = world.platform.device
    batches = [collate(windows, [window % len(windows)]).to(device) for window in range(THROUGHPUT_WINDOWS)]

    def logits(hidden: Any, batch: Any) -> None:
        real_logits(model, hidden.flatten(0, 1))

    forward_only(model, batches[:1], consume=logits)
    world.barrier()
    began = time.monotonic()
    forward_only(model, batches, consume=logits)
    world.platform.synchronize()
    world.barrier()
    tokens = sum(batch.tokens_BS.numel() for batch in batches) * model.layout.data
    return tokens / (time.monotonic() - began)


def _load_models(recipe: Recipe, inputs: Mapping[str, Artifact], world: World) -> dict[str, StageModel]:
    # tasks have requests of many lengths, which an interleaved pipeline does not take; weights are the same under every layout
    layout, models = global_layout(recipe.parallel.without_virtual_stages().without_context(), world), {}
    for name, (arch, checkpoint) in compared_models(recipe, inputs).items():
        models[name] = build_model(arch, layout, world.platform, torch_dtype(recipe.precision), variable_lengths=True)
        load_model(models[name], checkpoint)
    return models


def compared_models(recipe: Recipe, inputs: Mapping[str, Artifact]) -> dict[str, tuple[Architecture, Path]]:
    """Architecture and checkpoint of each column: the teacher that was distilled from (of several the first) and what became of the student."""
    students = {name: inputs[stage] for name, stage in STAGE_OF_STUDENT.items() if stage in inputs and name in recipe.evaluate.names}
    found = {name: (Architecture.from_dict(artifact.result["architecture"]), artifact.path / "checkpoint") for name, artifact in students.items()}
    return {"teacher": first_teacher(recipe, inputs), **found}


def _windows(settings: Evaluate, data: Artifact) -> dict[str, TokenDataset]:
    return {
        domain: evaluation_windows(data.path / part, sequence_length=settings.sequence_length, tokens=settings.tokens)
        for domain, part in DOMAINS.items()
        if part in data.result["parts"]
    }


def _continuation(model: StageModel, settings: Evaluate, tokenizer: Tokenizer) -> str:
    prompt = tokenizer.encode(settings.prompt) or [tokenizer.eod]
    (ids,) = generate(model, torch.tensor([prompt]), new_tokens=settings.generate_tokens, eod=tokenizer.eod)
    return tokenizer.decode([token for token in ids if token != tokenizer.eod])


def _perplexities(figures: dict[str, Any], domain: str) -> str:
    return " / ".join(f"{figure['domains'][domain]['perplexity']['value']:.2f}" for figure in figures.values())
