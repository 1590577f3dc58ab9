"""Stages that run models forward only: importance, depth, teacher-logits, labels, evaluate, and a search's short distillations beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from minitron_megatron.config.depth import Depth
from minitron_megatron.config.search import Search
from minitron_megatron.parallel.split import hidden_state_work, logits_work
from minitron_megatron.plan.activations import FP32, Pass, forward_beside
from minitron_megatron.plan.case import Case
from minitron_megatron.plan.fp8 import frozen_bytes
from minitron_megatron.plan.memory import Memory, training_memory, worst
from minitron_megatron.plan.time import chunk_seconds, training_time
from minitron_megatron.plan.weights import chunk_weights
from minitron_megatron.plan.work import Work, loss_work, model_flops

WINDOWS_AT_A_TIME, CHUNK_TOKENS = 8, 256
"""evaluate/compare.py."""
LOGIT_COPIES = 4
"""fp32 tensors as large as a chunk's logits that exist at one time, at most."""
DOMAINS = 2


@dataclass(frozen=True)
class ForwardPlan:
    tokens: int | None
    flops: float | None
    memory: Memory
    seconds: float | None
    processes: int
    written: int | None = None
    note: str = ""


def forward_plans(case: Case) -> dict[str, Callable[[], ForwardPlan]]:
    """By stage, made when it is asked for: sections that a recipe lacks have no stage."""
    return {
        "importance": lambda: _importance(case),
        "depth": lambda: _depth(case),
        "teacher-logits": lambda: _teacher_logits(case),
        "labels": lambda: _labels(case),
        "evaluate": lambda: _evaluate(case),
        "search": lambda: _search(case),
    }


def _importance(case: Case) -> ForwardPlan:
    settings = case.recipe.importance
    run = case.forward(case.source, settings.micro_batch, settings.sequence_length, hidden_state_work(case.source))
    tokens = settings.samples * settings.sequence_length
    return _plan(case, [run], tokens, output=False, note="forward only, without logits")


def _depth(case: Case) -> ForwardPlan:
    settings = case.recipe.depth
    if settings is None:
        raise RuntimeError("stage depth without a section depth")
    run = case.forward(case.source, settings.micro_batch, settings.sequence_length, logits_work(case.source))
    passes = _removals(settings, case.source.layers, settings.drop or case.source.layers - case.target.layers)
    tokens = 0 if settings.criterion in ("influence", "task") else passes * settings.samples * settings.sequence_length
    return _plan(case, [run], tokens, note=f"{passes} models with layers left out; tasks are not counted")


def _removals(settings: Depth, layers: int, dropped: int) -> int:
    """Models that are measured, the whole one among them."""
    tried = max(layers - settings.first_protected - settings.last_protected, 1)
    if settings.how == "greedy":
        return 1 + sum(tried - gone for gone in range(min(dropped, tried)))
    return 1 + (tried if settings.how == "ranked" else max(tried - dropped + 1, 1))


def _teacher_logits(case: Case) -> ForwardPlan:
    settings, distill = case.recipe.teacher_logits, case.recipe.distill
    if settings is None:
        raise RuntimeError("stage teacher-logits without a section teacher_logits")
    run = case.taught(case.forward(case.source, settings.micro_batch, distill.sequence_length, logits_work(case.source)))
    tokens = (settings.samples or distill.steps * distill.global_batch) * distill.sequence_length
    of_a_token = settings.k * 5 if settings.kind == "top_k" else settings.draws * 4
    note = "about 5 bytes for each of the K likeliest tokens, before compression" if settings.kind == "top_k" else "before compression"
    return _plan(case, [run], tokens, written=tokens * of_a_token, chunk=settings.chunk_tokens, note=note)


def _labels(case: Case) -> ForwardPlan:
    """Prompt in one pass, then a pass for each new token, which takes as long as reading the weights."""
    settings = case.recipe.labels
    if settings is None:
        raise RuntimeError("stage labels without a section labels")
    run = case.forward(case.source, settings.micro_batch, settings.prompt_tokens, logits_work(case.source))
    tokens = settings.samples * (settings.prompt_tokens + settings.new_tokens)
    found = _plan(case, [run], tokens, note="each new token reads all weights")
    if case.machine is None or found.seconds is None:
        return found
    weights = max(_weights(run, rank, output=True) for rank in range(run.split.pipeline)) * run.split.pipeline
    batches = -(-settings.samples // (settings.micro_batch * run.split.data))
    reading = batches * settings.new_tokens * case.machine.seconds(Work(0.0, float(weights)))
    return ForwardPlan(found.tokens, found.flops, found.memory, found.seconds + reading, found.processes, note=found.note)


def _evaluate(case: Case) -> ForwardPlan:
    """All models in memory together."""
    settings = case.recipe.evaluate
    teacher = (case.teachers or [case.source])[0]
    models = [teacher, *[case.target for name in settings.names if name != "teacher" and (name != "finetuned" or case.recipe.finetune)]]
    runs = [case.forward(arch, 1, settings.sequence_length, logits_work(arch)) for arch in models]
    domains = DOMAINS if case.recipe.data.out_of_domain else 1
    tokens = None if settings.tokens == "all" else settings.tokens * domains
    note = f"{len(models)} models together; tasks and speed are not counted" + ("; tokens: all of the held-out text" if tokens is None else "")
    return _plan(case, runs, tokens, chunk=CHUNK_TOKENS, windows=WINDOWS_AT_A_TIME, note=note)


def _search(case: Case) -> ForwardPlan:
    """Short distillations of the largest candidate, each as a job of its own."""
    settings = case.recipe.search
    if settings is None:
        raise RuntimeError("stage search without a section search")
    short = settings.short_distillation
    changes = {name: getattr(short, name) for name in ("global_batch", "micro_batch", "sequence_length") if getattr(short, name)}
    distill = case.recipe.distill.model_copy(update=changes)
    plan, steps = case.training(case.target, distill), steps_of_a_search(settings)
    per_step = distill.global_batch * distill.sequence_length
    flops = model_flops(plan.run, per_step, passes=3) + sum(model_flops(one.run, per_step, passes=1) for one in plan.teachers)
    seconds = steps * training_time(plan, case.machine).total / settings.jobs if case.machine else None
    memory = worst([training_memory(plan, rank) for rank in range(plan.split.pipeline)])
    processes = case.recipe.parallel.processes * settings.jobs
    return ForwardPlan(
        steps * per_step, steps * flops, memory, seconds, processes, note=f"{steps} steps in all, counted as those of the largest candidate"
    )


def steps_of_a_search(settings: Search) -> int:
    """Of all candidates together: after each round but the last a share of them goes on."""
    candidates, before, steps = settings.shortlist, 0, 0
    for finished in settings.short_distillation.rounds:
        steps += candidates * (finished - before)
        candidates, before = -int(-candidates * settings.short_distillation.keep // 1), finished
    return steps


def _plan(
    case: Case,
    runs: list[Pass],
    tokens: int | None,
    *,
    output: bool = True,
    written: int | None = None,
    chunk: int = 0,
    windows: int = 0,
    note: str = "",
) -> ForwardPlan:
    """Models one after another over the same tokens. chunk: tokens whose logits exist at one time; windows: whose last states are kept."""
    ranks = range(runs[0].split.pipeline)
    memory = worst([_memory(runs, rank, output=output, chunk=chunk, windows=windows) for rank in ranks])
    flops = None if tokens is None else sum(model_flops(run, tokens, passes=1, output=output) for run in runs)
    seconds = None if tokens is None or case.machine is None else sum(_seconds(case, run, tokens, output=output) for run in runs)
    return ForwardPlan(tokens, flops, memory, seconds, case.recipe.parallel.processes, written, note)


def _memory(runs: list[Pass], rank: int, *, output: bool, chunk: int, windows: int) -> Memory:
    run, is_last = runs[0], rank == runs[0].split.pipeline - 1
    parts = {
        "weights": sum(_weights(one, rank, output=output) for one in runs),
        "working memory": max(forward_beside(one, one.split.arch.ffn) for one in runs),
        "last hidden states": sum(windows * one.state // one.samples for one in runs) if is_last else 0,
        "logits of a chunk and losses": LOGIT_COPIES * chunk * run.split.vocabulary_rows * FP32 if is_last else 0,
    }
    return Memory({name: size for name, size in parts.items() if size}, where=f"pipeline rank {rank}")


def _weights(run: Pass, rank: int, *, output: bool) -> int:
    chunks = run.split.chunks(rank)
    return sum(frozen_bytes(chunk_weights(run.split, chunk, output=output), run.fp8, run.split.arch.layers, run.width) for chunk in chunks)


def _seconds(case: Case, run: Pass, tokens: int, *, output: bool) -> float:
    """Micro-batches one after another through the pipeline, at the pace of its slowest rank."""
    if case.machine is None:
        return 0.0
    of_ranks = [sum(chunk_seconds(run, chunk, case.machine) for chunk in run.split.chunks(rank)) for rank in range(run.split.pipeline)]
    if output:
        of_ranks[-1] += case.machine.seconds(loss_work(run, products=1))
    micro_batches = -(-tokens // (run.tokens * run.split.data))
    return (micro_batches - 1) * max(of_ranks) + sum(of_ranks)
