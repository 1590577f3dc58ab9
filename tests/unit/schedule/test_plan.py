"""What `minitron plan` counts, prints and draws."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from minitron_megatron.arch.architecture import Architecture, layer_cost, parameters_by_part
from minitron_megatron.config.family import load_recipe
from minitron_megatron.errors import LayoutError
from minitron_megatron.schedule.picture import gantt_svg, row
from minitron_megatron.schedule.plan import schedule_rows, schedule_table
from minitron_megatron.schedule.works import distillation_works

DEMO = str(Path(__file__).parents[3] / "configs" / "smollm2_135m_to_97m.yaml")
TEACHER = Architecture("llama", 9, 64, 8, 2, 8, 96, 640, False, 64, 1e-6, 10000.0)
STUDENT = TEACHER.resized(layers=7, hidden=48, ffn=64)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_no_work_is_lost_in_the_split_and_a_student_meets_each_matrix_three_times(ranks: int) -> None:
    def matrices(arch: Architecture) -> int:
        parts = parameters_by_part(arch)
        return parts["attention"] + parts["ffn"]

    works = distillation_works(STUDENT, [TEACHER], ranks)
    unit = matrices(STUDENT) // STUDENT.layers
    outputs = 3 * STUDENT.vocab * STUDENT.hidden + TEACHER.vocab * TEACHER.hidden
    assert sum(works.teacher) * unit == pytest.approx(matrices(TEACHER))
    assert sum(works.forward) * unit == pytest.approx(matrices(STUDENT) + outputs)
    assert sum(works.backward) * unit == pytest.approx(2 * matrices(STUDENT))
    assert [len(part) for part in (works.teacher, works.forward, works.backward)] == [ranks] * 3


def test_each_teacher_adds_its_pass_and_its_output_layer() -> None:
    one, two = (distillation_works(STUDENT, [TEACHER] * teachers, 3) for teachers in (1, 2))
    assert two.teacher == pytest.approx([2 * work for work in one.teacher])
    assert sum(two.forward) - sum(one.forward) == pytest.approx(TEACHER.vocab * TEACHER.hidden / layer_cost(STUDENT))


@pytest.mark.parametrize("virtual", [2, 3])
def test_virtual_stages_hold_the_same_work(virtual: int) -> None:
    whole, dealt = distillation_works(STUDENT, [TEACHER], 2), distillation_works(STUDENT, [TEACHER], 2, virtual=virtual)
    assert (len(dealt.teacher), len(dealt.forward), len(dealt.backward)) == (2, 2 * virtual, 2 * virtual)
    assert dealt.teacher == whole.teacher
    assert (sum(dealt.forward), sum(dealt.backward)) == pytest.approx((sum(whole.forward), sum(whole.backward)))


def test_the_rows_are_pipelines_with_and_without_virtual_stages_that_the_models_and_the_micro_batches_allow() -> None:
    recipe = load_recipe(DEMO, ["distill.global_batch=12", "distill.micro_batch=2", "parallel.pipeline=3", "parallel.virtual=2"])
    rows = schedule_rows(recipe, TEACHER, STUDENT)
    assert [(item.ranks, item.virtual) for item in rows] == [(2, 1), (2, 2), (3, 2), (4, 1)]  # 7 layers, 6 micro-batches
    assert ["one_schedule" in item.over_ideal for item in rows] == [True, False, False, True]
    console = Console(width=200, record=True, file=StringIO())
    console.print(schedule_table(rows, recipe.parallel))
    text = console.export_text()
    assert "3 × virtual 2 (recipe)" in text and "2 × virtual 2 " in text and "–" in text


def test_the_picture_of_virtual_stages_has_a_bar_for_every_pass_and_no_strip_that_does_not_exist() -> None:
    svg = gantt_svg(distillation_works(STUDENT, [TEACHER], 2, virtual=2), 4)
    bars = svg.count("var(--card); stroke-width: 0.5")
    assert bars >= 4 + 8 + 2 * 2 * 2 * 2 * 4
    assert "2 ranks with 2 virtual stages each" in svg and "both in one schedule" not in svg


def test_more_ranks_than_layers_are_refused() -> None:
    with pytest.raises(LayoutError, match="more than the model's 7 layers"):
        distillation_works(STUDENT, [TEACHER], 8)


def test_a_teacher_in_the_students_schedule_takes_longest() -> None:
    over = row(distillation_works(STUDENT, [TEACHER], 4), 8).over_ideal
    assert 1 < over["teacher_pipelined"] < over["one_schedule"]
    assert 1 < over["teacher_on_one_rank"] < over["one_schedule"]


def test_the_picture_has_a_bar_for_every_pass() -> None:
    """8 micro-batches on 4 ranks: 8 + 32 passes of the teacher, and three times 64 of the student."""
    svg = gantt_svg(distillation_works(STUDENT, [TEACHER], 4), 8)
    bars = svg.count("var(--card); stroke-width: 0.5")
    assert bars >= 8 + 32 + 3 * 64
    assert "× ideal" in svg
