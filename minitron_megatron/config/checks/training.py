"""What a distillation's batch, losses and machinery have to agree on."""

from __future__ import annotations

from minitron_megatron.arch.architecture import Architecture, nearest_multiples
from minitron_megatron.config.checks.losses import loss_problems
from minitron_megatron.config.distill import Training, TrainingRun
from minitron_megatron.config.schema import Recipe


def batch_problems(recipe: Recipe) -> list[str]:
    problems = [problem for section, run in recipe.training_runs().items() for problem in _run_problems(section, run, recipe.parallel.data)]
    return problems + loss_problems(recipe.distill)


def _run_problems(section: str, run: TrainingRun, data: int) -> list[str]:
    problems, rate = [], run.learning_rate
    together = run.micro_batch * data
    if run.global_batch % together:
        problems.append(
            f"{section}.global_batch={run.global_batch} is not divisible by micro_batch × parallel.data = {together}; "
            f"nearest: {nearest_multiples(run.global_batch, together)}"
        )
    if rate.warmup_steps >= run.steps:
        problems.append(f"{section}.learning_rate.warmup_steps={rate.warmup_steps} must be less than {section}.steps={run.steps}")
    if rate.minimum > rate.peak:
        problems.append(f"{section}.learning_rate.minimum is above its peak")
    return problems


def hidden_problems(recipe: Recipe, source: Architecture, target: Architecture) -> list[str]:
    """Of distill.hidden: pairs that one of the models lacks, and a weight that follows nothing. source: the teacher's architecture."""
    hidden = recipe.distill.hidden
    if hidden is None:
        return []
    problems = []
    against_teacher = [name for name, weight in recipe.distill.loss.items() if name != "cross_entropy" and weight]
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
    elif hidden.pairs == "kept" and recipe.prune.drop_layers and min(recipe.prune.drop_layers) >= target.layers:
        problems.append("distill.hidden.pairs=kept: prune.drop_layers are the last layers, and no kept one follows; use last_minus_2 or give pairs")
    if hidden.weight == "dynamic" and not against_teacher:
        problems.append(
            "distill.hidden.weight=dynamic follows the losses against the teacher's logits, of which distill.loss has none; "
            "give a number as weight, or add forward_kl"
        )
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


def training_problems(training: Training) -> list[str]:
    """What megatron-core's buckets cannot do: weights are gathered into the buckets whose gradients were scattered ahead of it."""
    needed = [name for name in ("distributed_optimizer", "overlap_grad_reduce") if not getattr(training, name)]
    if not training.overlap_param_gather or not needed:
        return []
    mend = " and ".join(f"training.{name}=true" for name in needed)
    return [f"training.overlap_param_gather=true needs {mend}; set that, or training.overlap_param_gather=false"]


def overlap_problems(recipe: Recipe) -> list[str]:
    """What Transformer Engine's user buffers cannot do: read in its 2.11 (initialize_ub, fill_userbuffers_buffer_for_all_gather)."""
    if not recipe.training.overlap_tensor_parallel:
        return []
    where, parallel, problems = "training.overlap_tensor_parallel=true", recipe.parallel, []
    if recipe.platform == "cpu":
        problems.append(f"{where} is Transformer Engine's, on CUDA; set it to false, or platform=cuda")
    if parallel.tensor == 1 or not parallel.sequence:
        problems.append(
            f"{where} overlaps the exchange of sequence shards; set parallel.tensor=2 or more and parallel.sequence=true, or leave it out"
        )
    if recipe.precision == "fp32":
        problems.append(f"{where}: its buffers hold bf16 or FP8; set precision=bf16, or leave it out")
    if recipe.fp8 and recipe.fp8.student in ("blockwise", "nvfp4"):
        problems.append(f"{where}: its buffers do not carry {recipe.fp8.student} scales; set fp8.student=tensorwise, or leave it out")
    if recipe.fp8 and recipe.fp8.student == "mxfp8":
        multiple = 128 * parallel.context * parallel.tensor
        problems += [
            f"{where}: its buffers hold mxfp8 in 128 tokens of a rank at a time, and {section}.micro_batch × sequence_length = {tokens} is no "
            f"multiple of {multiple}; nearest: {nearest_multiples(tokens, multiple)}"
            for section, run in recipe.training_runs().items()
            if (tokens := run.micro_batch * run.sequence_length) % multiple
        ]
    return problems
