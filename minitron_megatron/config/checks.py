"""Cross-checks of a recipe against the architecture: every problem at once, each with its mend."""

from __future__ import annotations

from minitron_megatron.arch.architecture import Architecture, nearest_multiples
from minitron_megatron.config.schema import Parallel, Recipe, Rule, Target, TeacherParallel, Training
from minitron_megatron.errors import RecipeError

WIDTH_OF_EXPERTS = 8
"""transformers multiplies all experts in one call of torch's grouped_mm, which wants strides of 16 bytes: 8 values in bf16."""


def target_architecture(recipe: Recipe, source: Architecture) -> Architecture:
    """The architecture after pruning; raises RecipeError with every size that does not fit the source."""
    problems = [
        f"prune.target.{name}={size} is larger than the source's {getattr(source, name)}"
        for name, size in recipe.prune.target.sizes().items()
        if size > getattr(source, name) and (name != "experts" or source.experts)
    ]
    problems += _expert_problems(recipe.prune.target, source)
    heads = recipe.prune.target.heads or source.heads
    if heads % source.kv_groups:
        problems.append(
            f"prune.target.heads={heads} is not divisible by the model's {source.kv_groups} key/value groups; "
            f"nearest: {nearest_multiples(heads, source.kv_groups)}"
        )
    hidden = recipe.prune.target.hidden or source.hidden
    if not problems and source.family.hidden_multiple_of_heads and hidden % heads:
        problems.append(
            f"prune.target: hidden={hidden} is not a multiple of heads={heads}, and transformers would not load such a {source.family_name}; "
            f"nearest hidden: {nearest_multiples(hidden, heads)}"
        )
    if problems:
        raise RecipeError(problems)
    return source.resized(**recipe.prune.target.sizes())


def _expert_problems(target: Target, source: Architecture) -> list[str]:
    if not source.experts:
        return [f"prune.target.experts={target.experts}: the family {source.family_name} has no experts; leave it out"] if target.experts else []
    problems = []
    if target.experts and target.experts < source.experts_per_token:
        problems.append(
            f"prune.target.experts={target.experts} is less than the {source.experts_per_token} that each token is sent to; "
            f"at least {source.experts_per_token}"
        )
    for name, size in (("hidden", target.hidden), ("ffn", target.ffn)):
        if size and size % WIDTH_OF_EXPERTS and size != getattr(source, name):
            problems.append(
                f"prune.target.{name}={size} is not a multiple of {WIDTH_OF_EXPERTS}, and transformers would not run such experts; "
                f"nearest: {nearest_multiples(size, WIDTH_OF_EXPERTS)}"
            )
    return problems


def check_recipe(recipe: Recipe, source: Architecture) -> Architecture:
    """Raises RecipeError with everything in the recipe that this source cannot do; returns the target architecture."""
    problems: list[str] = []
    target = source
    try:
        target = target_architecture(recipe, source)
    except RecipeError as error:
        problems += error.problems
    else:
        problems += _hidden_problems(recipe, source, target)
    problems += _layout_problems(recipe.parallel, source, "the source model")
    if target != source:
        problems += _layout_problems(recipe.parallel, target, "the pruned model")
    stages, rule = recipe.parallel.pipeline * recipe.parallel.virtual, recipe.parallel.layers_per_stage
    problems += _list_problems("parallel", stages, rule, {source.layers, target.layers})
    problems += _shape_problems(recipe) + _teacher_problems(recipe, source)
    problems += _length_problems(recipe, source)
    problems += _batch_problems(recipe)
    if recipe.prune.scores_file and recipe.prune.scores != "activation":
        problems.append(f"prune.scores_file holds activation scores, but prune.scores={recipe.prune.scores}; leave one of them out")
    problems += _training_problems(recipe.training)
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    return target


def _layout_problems(parallel: Parallel, arch: Architecture, whose: str) -> list[str]:
    problems = _tensor_problems("parallel", parallel.tensor, arch, whose)
    problems += _expert_layout_problems(parallel, arch, whose)
    problems += _stage_problems("parallel", parallel.pipeline * parallel.virtual, arch, whose)
    if parallel.sequence and parallel.tensor == 1:
        problems.append("parallel.sequence=true needs parallel.tensor of 2 or more; set parallel.sequence=false")
    return problems


def _shape_problems(recipe: Recipe) -> list[str]:
    """Of sizes that no model could have."""
    parallel, problems = recipe.parallel, []
    if parallel.virtual > 1 and parallel.pipeline == 1:
        problems.append(f"parallel.virtual={parallel.virtual} needs parallel.pipeline of 2 or more; set parallel.virtual=1")
    if parallel.context > 1:
        problems.append(
            f"parallel.context={parallel.context}: megatron-core's context parallelism needs Transformer Engine's attention on a GPU, "
            "which this layer spec does not use; set parallel.context=1"
        )
    micro_batches = recipe.distill.global_batch // (recipe.distill.micro_batch * parallel.data)
    if parallel.virtual > 1 and micro_batches % parallel.pipeline:
        problems.append(
            f"parallel.virtual={parallel.virtual} needs a multiple of parallel.pipeline={parallel.pipeline} micro-batches a step, but "
            f"distill.global_batch / (micro_batch × parallel.data) = {micro_batches}; nearest: {nearest_multiples(micro_batches, parallel.pipeline)}"
        )
    return problems


def _teacher_problems(recipe: Recipe, source: Architecture) -> list[str]:
    parallel, teacher = recipe.parallel, recipe.parallel.teacher
    if not isinstance(teacher, TeacherParallel):
        return []
    if source.experts:
        return ["parallel.teacher: a layout of its own is not supported for a source model with experts; set parallel.teacher=student"]
    problems = _tensor_problems("parallel.teacher", teacher.tensor, source, "the source model")
    problems += _stage_problems("parallel.teacher", teacher.pipeline, source, "the source model")
    problems += _list_problems("parallel.teacher", teacher.pipeline, teacher.layers_per_stage, {source.layers})
    model_processes = teacher.tensor * teacher.pipeline
    if parallel.processes % model_processes:
        problems.append(
            f"parallel.teacher: tensor {teacher.tensor} × pipeline {teacher.pipeline} = {model_processes} does not divide the "
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
    sizes = (("heads", arch.heads), ("key/value groups", arch.kv_groups), ("ffn", arch.ffn))
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


def _list_problems(key: str, stages: int, rule: Rule, layers: set[int]) -> list[str]:
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
    return ", ".join(str(size) for size in range(1, arch.kv_groups + 1) if not (arch.heads % size or arch.kv_groups % size or arch.ffn % size))


def _length_problems(recipe: Recipe, arch: Architecture) -> list[str]:
    problems = []
    limit = min(arch.max_positions, arch.attention_window or arch.max_positions)
    for section in ("importance", "distill", "evaluate"):
        length = getattr(recipe, section).sequence_length
        if length > limit:
            problems.append(f"{section}.sequence_length={length} is beyond the model's {limit} positions; at most {limit}")
        if recipe.parallel.sequence and length % recipe.parallel.tensor:
            problems.append(
                f"{section}.sequence_length={length} is not divisible by parallel.tensor={recipe.parallel.tensor} (sequence parallel); "
                f"nearest: {nearest_multiples(length, recipe.parallel.tensor)}"
            )
    return problems


def _batch_problems(recipe: Recipe) -> list[str]:
    distill = recipe.distill
    problems = []
    together = distill.micro_batch * recipe.parallel.data
    if distill.global_batch % together:
        problems.append(
            f"distill.global_batch={distill.global_batch} is not divisible by micro_batch × parallel.data = {together}; "
            f"nearest: {nearest_multiples(distill.global_batch, together)}"
        )
    if distill.learning_rate.warmup_steps >= distill.steps:
        problems.append(f"distill.learning_rate.warmup_steps={distill.learning_rate.warmup_steps} must be less than distill.steps={distill.steps}")
    if distill.learning_rate.minimum > distill.learning_rate.peak:
        problems.append("distill.learning_rate.minimum is above its peak")
    if not any(distill.loss.values()) or any(weight < 0 for weight in distill.loss.values()):
        problems.append(f"distill.loss={dict(distill.loss)} needs weights ≥ 0 and one above 0")
    return problems


def _hidden_problems(recipe: Recipe, source: Architecture, target: Architecture) -> list[str]:
    hidden = recipe.distill.hidden
    if hidden is None:
        return []
    problems = []
    if isinstance(hidden.pairs, list):
        problems += _pair_problems(hidden.pairs, source.layers, target.layers)
        if not hidden.pairs and not hidden.embeddings:
            problems.append("distill.hidden compares nothing; give distill.hidden.pairs or set embeddings=true, or leave distill.hidden out")
    elif hidden.pairs == "last_minus_2" and target.layers < 3:
        problems.append(f"distill.hidden.pairs=last_minus_2 needs 3 layers, the pruned model has {target.layers}; give pairs such as [[0, 0]]")
    elif hidden.pairs == "proportional" and target.layers < 2:
        problems.append("distill.hidden.pairs=proportional needs 2 layers, the pruned model has 1; give pairs such as [[0, 0]]")
    elif hidden.pairs == "kept" and target.layers == source.layers:
        problems.append("distill.hidden.pairs=kept needs dropped layers, and no layer is pruned; use last_minus_2 or give pairs")
    if hidden.weight == "dynamic" and not recipe.distill.loss.get("forward_kl"):
        problems.append("distill.hidden.weight=dynamic follows forward_kl, which distill.loss lacks; give a number as weight, or add forward_kl")
    return problems


def _pair_problems(pairs: list[tuple[int, int]], teacher_layers: int, student_layers: int) -> list[str]:
    problems = []
    for teacher, student in dict.fromkeys(pairs):
        where = f"distill.hidden.pairs: [{teacher}, {student}]"
        for layer, layers, whose in ((teacher, teacher_layers, "source"), (student, student_layers, "pruned")):
            if not 0 <= layer < layers:
                problems.append(f"{where} names layer {layer} of the {whose} model, which has layers 0 to {layers - 1}")
        if pairs.count((teacher, student)) > 1:
            problems.append(f"{where} is there {pairs.count((teacher, student))} times; name each pair once")
    return problems


def _training_problems(training: Training) -> list[str]:
    """What megatron-core's buckets cannot do: weights are gathered into the buckets whose gradients were scattered ahead of it."""
    needed = [name for name in ("distributed_optimizer", "overlap_grad_reduce") if not getattr(training, name)]
    if not training.overlap_param_gather or not needed:
        return []
    mend = " and ".join(f"training.{name}=true" for name in needed)
    return [f"training.overlap_param_gather=true needs {mend}; set that, or training.overlap_param_gather=false"]
