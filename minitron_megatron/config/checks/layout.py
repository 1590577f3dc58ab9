"""What the process groups can do with an architecture."""

from __future__ import annotations

from math import lcm

from minitron_megatron.arch.architecture import Architecture, nearest_multiples
from minitron_megatron.config.parallel import Parallel, Rule, TeacherParallel
from minitron_megatron.config.schema import Recipe


def layout_problems(parallel: Parallel, arch: Architecture, whose: str) -> list[str]:
    problems = _tensor_problems("parallel", parallel.tensor, arch, whose)
    problems += _expert_layout_problems(parallel, arch, whose)
    problems += _stage_problems("parallel", parallel.pipeline * parallel.virtual, arch, whose)
    if parallel.sequence and parallel.tensor == 1:
        problems.append("parallel.sequence=true needs parallel.tensor of 2 or more; set parallel.sequence=false")
    return problems


def shape_problems(recipe: Recipe) -> list[str]:
    """Of sizes that no model could have."""
    parallel, problems = recipe.parallel, []
    if parallel.virtual > 1 and parallel.pipeline == 1:
        problems.append(f"parallel.virtual={parallel.virtual} needs parallel.pipeline of 2 or more; set parallel.virtual=1")
    if parallel.context > 1:
        problems += _context_problems(recipe)
    for section, run in recipe.training_runs().items():
        micro_batches = run.global_batch // (run.micro_batch * parallel.data)
        if parallel.virtual > 1 and micro_batches % parallel.pipeline:
            nearest = nearest_multiples(micro_batches, parallel.pipeline)
            problems.append(
                f"parallel.virtual={parallel.virtual} needs a multiple of parallel.pipeline={parallel.pipeline} micro-batches a step, but "
                f"{section}.global_batch / (micro_batch × parallel.data) = {micro_batches}; nearest: {nearest}"
            )
    return problems


def _context_problems(recipe: Recipe) -> list[str]:
    """A sequence is cut into two chunks for each context rank, and what a rank has of it once more over its tensor ranks."""
    parallel, teacher = recipe.parallel, recipe.parallel.teacher
    shared_by = [own.tensor for own in (parallel, teacher) if not isinstance(own, str) and own.sequence]
    multiple, problems = lcm(2, *shared_by) * parallel.context, []
    why = f"two chunks for each of parallel.context={parallel.context} ranks" + (", whose tensor ranks share them" if shared_by else "")
    lengths = {section: run.sequence_length for section, run in recipe.training_runs().items()}
    if recipe.search and recipe.search.short_distillation.sequence_length:
        lengths["search.short_distillation"] = recipe.search.short_distillation.sequence_length
    for section, length in lengths.items():
        if length % multiple:
            problems.append(
                f"{section}.sequence_length={length} is not divisible by {multiple} ({why}); nearest: {nearest_multiples(length, multiple)}"
            )
    return problems


def teacher_problems(recipe: Recipe, source: Architecture, whose: str = "the source model") -> list[str]:
    """Of parallel.teacher, where it is a layout of its own. whose: the teacher, for messages."""
    parallel, teacher = recipe.parallel, recipe.parallel.teacher
    if not isinstance(teacher, TeacherParallel):
        return []
    if source.experts:
        return ["parallel.teacher: a layout of its own is not supported for a source model with experts; set parallel.teacher=student"]
    problems = _tensor_problems("parallel.teacher", teacher.tensor, source, whose)
    problems += _stage_problems("parallel.teacher", teacher.pipeline, source, whose)
    problems += list_problems("parallel.teacher", teacher.pipeline, teacher.layers_per_stage, {source.layers})
    model_processes = teacher.tensor * parallel.context * teacher.pipeline
    if parallel.processes % model_processes:
        context = f" × context {parallel.context}" if parallel.context > 1 else ""
        problems.append(
            f"parallel.teacher: tensor {teacher.tensor}{context} × pipeline {teacher.pipeline} = {model_processes} does not divide the "
            f"{parallel.processes} processes of parallel; choose sizes whose product does"
        )
    if teacher.sequence and teacher.tensor == 1:
        problems.append("parallel.teacher.sequence=true needs parallel.teacher.tensor of 2 or more; set it to false")
    length = recipe.distill.sequence_length
    if teacher.sequence and length % teacher.tensor:
        problems.append(
            f"distill.sequence_length={length} is not divisible by parallel.teacher.tensor={teacher.tensor} (sequence parallel); "
            f"nearest: {nearest_multiples(length, teacher.tensor)}"
        )
    return problems


def _tensor_problems(key: str, tensor: int, arch: Architecture, whose: str) -> list[str]:
    sizes = (("heads", arch.heads), ("key/value groups", arch.kv_groups), *(("ffn", width) for width in sorted(set(arch.ffn_widths))))
    # with fewer groups than ranks a group would have to be copied to several, and its gradient summed over them
    reason = {"key/value groups": " (a group belongs to one rank)"}
    return [
        f"{key}.tensor={tensor} does not divide {whose}'s {size} {field}{reason.get(field, '')}; tensor sizes that do: {_common_divisors(arch)}"
        for field, size in sizes
        if size % tensor
    ]


def _stage_problems(key: str, stages: int, arch: Architecture, whose: str) -> list[str]:
    if stages <= arch.layers:
        return []
    return [f"{key}.pipeline × virtual = {stages} is more than {whose}'s {arch.layers} layers; at most {arch.layers}"]


def list_problems(key: str, stages: int, rule: Rule, layers: set[int]) -> list[str]:
    """A list is for one number of layers; a model of another number is split by cost."""
    if isinstance(rule, str) or (len(rule) == stages and sum(rule) in layers):
        return []
    models = " or ".join(map(str, sorted(layers)))
    return [
        f"{key}.layers_per_stage={list(rule)} has {len(rule)} entries and {sum(rule)} layers; "
        f"it needs {stages} entries (pipeline × virtual) that add up to {models} layers, or use cost"
    ]


def _expert_layout_problems(parallel: Parallel, arch: Architecture, whose: str) -> list[str]:
    if not arch.experts:
        return [f"parallel.expert={parallel.expert}, but {whose} has no experts; set parallel.expert=1"] if parallel.expert > 1 else []
    problems = []
    if parallel.context > 1:
        problems.append(f"parallel.context={parallel.context} is not supported for {whose}, which has experts; set parallel.context=1")
    if parallel.tensor > 1:
        problems.append(
            f"parallel.tensor={parallel.tensor}: tensor parallelism is not supported for {whose}, which has experts; "
            "set parallel.tensor=1 and use parallel.expert and parallel.pipeline"
        )
    for field, size in (("experts", arch.experts), ("data-parallel ranks", parallel.data)):
        if size % parallel.expert:
            whole = f"{whose}'s {size} {field}" if field == "experts" else f"parallel.data={size}"
            problems.append(f"parallel.expert={parallel.expert} does not divide {whole}; nearest: {_nearest_divisors(size, parallel.expert)}")
    return problems


def _nearest_divisors(size: int, wanted: int) -> str:
    """The divisors of size on both sides of wanted."""
    divisors = [number for number in range(1, size + 1) if size % number == 0]
    below, above = [number for number in divisors if number < wanted][-1:], [number for number in divisors if number > wanted][:1]
    return ", ".join(map(str, below + above))


def _common_divisors(arch: Architecture) -> str:
    sizes = {arch.heads, arch.kv_groups, *arch.ffn_widths}
    return ", ".join(str(divisor) for divisor in range(1, arch.kv_groups + 1) if not any(size % divisor for size in sizes))
