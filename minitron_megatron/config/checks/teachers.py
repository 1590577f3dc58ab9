"""What several teachers, a correction and a fine-tuning have to agree on with the rest of the recipe."""

from __future__ import annotations

from collections.abc import Mapping

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.arch.source import source_architecture
from minitron_megatron.config.checks.layout import layout_problems, teacher_problems
from minitron_megatron.config.schema import Recipe
from minitron_megatron.config.teachers import SOURCE, TeacherModel
from minitron_megatron.errors import MinitronError

Planned = Mapping[str, Architecture]
"""Path → what will lie there: models that an earlier step of a family has yet to make, or makes anew."""


def stage_problems(recipe: Recipe) -> list[str]:
    """Of sections that need another one."""
    problems = []
    if recipe.finetune and not recipe.chat:
        problems.append("finetune: trains on conversations, which no section names; add the section chat, with chat.train")
    source_teaches = recipe.teachers is None or any(model.is_source for model in recipe.teachers.models)
    if recipe.correct and not source_teaches:
        problems.append(f"correct: corrects the source, which is none of teachers.models; add {{path: {SOURCE}}} there, or leave correct out")
    hidden = recipe.distill.hidden
    if recipe.teachers and not recipe.teachers.models[0].is_source and hidden and hidden.pairs == "kept":
        problems.append("distill.hidden.pairs=kept goes by the layers that were cut out of the source, but the first of teachers.models is another")
    return problems


def teacher_architectures(recipe: Recipe, source: Architecture, planned: Planned | None = None) -> list[Architecture]:
    """Of the recipe's teachers in order; the source's in the place of one that cannot be read, which models_problems tells."""
    models = recipe.teachers.models if recipe.teachers else []
    return [source if model.is_source else _readable(model, planned) or source for model in models] or [source]


def _readable(model: TeacherModel, planned: Planned | None) -> Architecture | None:
    try:
        return _architecture_of(model, planned)
    except MinitronError:
        return None


def _architecture_of(model: TeacherModel, planned: Planned | None) -> Architecture:
    return (planned or {}).get(model.path) or source_architecture(model.path, model.hf_config)


def models_problems(recipe: Recipe, source: Architecture, planned: Planned | None = None) -> list[str]:
    """Of each teacher beside the source."""
    models = recipe.teachers.models if recipe.teachers else []
    return [problem for model in models if not model.is_source for problem in _model_problems(recipe, model, source, planned)]


def _model_problems(recipe: Recipe, model: TeacherModel, source: Architecture, planned: Planned | None) -> list[str]:
    try:
        arch = _architecture_of(model, planned)
    except MinitronError as error:
        return [f"teachers.models: {str(error).replace('model.', 'teachers.models.')}"]
    whose, problems = f"the teacher {model.path}", []
    if arch.vocab != source.vocab:
        problems.append(
            f"teachers.models: {model.path} has a vocabulary of {arch.vocab}, not the source's of {source.vocab}; name one that shares it"
        )
    limit = min(arch.max_positions, arch.attention_window or arch.max_positions)
    if recipe.distill.sequence_length > limit:
        problems.append(f"distill.sequence_length={recipe.distill.sequence_length} is beyond the {limit} positions of {whose}; at most {limit}")
    return problems + layout_problems(recipe.parallel, arch, whose) + teacher_problems(recipe, arch, whose)
