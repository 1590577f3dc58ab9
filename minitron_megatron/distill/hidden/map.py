"""Which hidden states of teacher and student are compared, and which part of the student's pipeline holds them.

Layers are counted from 0 over the whole model. The state of a layer is its first norm's output: what enters its attention
(arXiv 2407.14679, section 3: hidden states are taken after the norm).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from minitron_megatron.config.distill import HiddenLoss
from minitron_megatron.errors import PlanError

StateName = tuple[str | int, ...]
"""("layer", number) or ("embedding",)."""
EMBEDDING: StateName = ("embedding",)


class Term(NamedTuple):
    """One comparison: the student's state, projected, is drawn to the teacher's."""

    teacher: StateName
    student: StateName
    projection: str
    """Name of the projection that takes the student's channels to the teacher's."""


def layer_state(layer: int) -> StateName:
    return ("layer", layer)


def layer_pairs(settings: HiddenLoss, teacher_layers: int, student_layers: int, kept_layers: Sequence[int]) -> list[tuple[int, int]]:
    """[(teacher layer, student layer)] of a recipe; kept_layers: the source layer of each student layer, from plan.json.

    last_minus_2: (last − 2, last − 2), P1's 29 : 13 of 32 and 16 layers. proportional: every student layer but the first, whose state is
    the embedding, with the teacher layer as far up its model. kept: the first kept layer after each dropped block, which is where the student
    must have made up for that block. Raises PlanError where the rule kept finds no such layer.
    """
    if isinstance(settings.pairs, list):
        return list(settings.pairs)
    if settings.pairs == "last_minus_2":
        return [(teacher_layers - 3, student_layers - 3)]
    if settings.pairs == "proportional":
        # s layers lie below the state of layer s; the half is rounded up
        return [((2 * s * teacher_layers + student_layers) // (2 * student_layers), s) for s in range(1, student_layers)]
    return _after_dropped_blocks(kept_layers)


def _after_dropped_blocks(kept_layers: Sequence[int]) -> list[tuple[int, int]]:
    before = [-1, *kept_layers]
    found = [(source, student) for student, source in enumerate(kept_layers) if source != before[student] + 1]
    if not found:
        raise PlanError("distill.hidden.pairs=kept: no kept layer follows a dropped one in this plan; use last_minus_2 or give pairs")
    return found


def hidden_terms(settings: HiddenLoss, pairs: Sequence[tuple[int, int]]) -> list[Term]:
    """Every comparison of a run, in the order in which its sums are logged: the pairs, then the embeddings."""
    terms = [Term(layer_state(teacher), layer_state(student), f"pair_{teacher}_{student}") for teacher, student in pairs]
    if settings.embeddings:
        terms.append(Term(EMBEDDING, EMBEDDING, "embedding"))
    return [term._replace(projection="shared") for term in terms] if settings.projection == "shared" else terms


def stage_of(state: StateName, layers_per_stage: Sequence[int]) -> int:
    """The (virtual) stage where a state arises; layers_per_stage in the order of the model's depth."""
    ends = accumulate(layers_per_stage)
    return 0 if state == EMBEDDING else next(number for number, end in enumerate(ends) if int(state[1]) < end)


def projection_holders(terms: Sequence[Term], layers_per_chunk: Sequence[int]) -> dict[str, list[int]]:
    """Projection → the chunks of the student that use it, ascending.

    layers_per_chunk: layers of each chunk in the order in which a sample passes them; chunk c stands on pipeline rank c mod pipeline size.
    """
    found: dict[str, set[int]] = {}
    for term in terms:
        found.setdefault(term.projection, set()).add(stage_of(term.student, layers_per_chunk))
    return {name: sorted(chunks) for name, chunks in found.items()}
