"""A teacher's stored outputs: the same bytes whoever writes them, and the same training whoever reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_megatron.artifact import find_artifact
from minitron_megatron.chain import STAGES, finished, is_asked, stage_inputs
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.config.schema import Recipe
from minitron_megatron.config.teacher_logits import TeacherLogits
from minitron_megatron.data.samples import evaluation_windows, packed_samples
from minitron_megatron.distill.stored import StoredTeachers
from minitron_megatron.parallel.layout import destroy_layout
from minitron_megatron.parallel.world import World
from minitron_megatron.stored.records import TopKRecord
from minitron_megatron.teacher_logits import stage

from .conftest import Record
from .house import SOURCE, copy_of, publish_stage, recipe_for
from .plain_model import PlainModel
from .pool import Pool, WorkerError
from .tiny import CP2, DP2, ONE, PP2, PP2_VPP2, SEQUENCE, TP2_SP, VOCAB, name_of, relative_difference

STEPS = 4
ALL_BUT_ONE = {"k": VOCAB - 1, "log_probs": "float32"}
"""K + 1 classes of one token each: nothing is lost."""


def asked(runs: Path, parallel: Parallel = ONE, *, stored: dict[str, Any] | None = None, read: bool = True, **distill: Any) -> Recipe:
    """16 training samples and 5 windows in blocks of 3: no number divides another."""
    section = TeacherLogits(**{"k": 5, "block_samples": 3, "micro_batch": 2, "chunk_tokens": 7, **(stored or {})})
    settings = {"steps": STEPS, "save_every_steps": 9, "learning_rate": {"warmup_steps": 1}, **distill}
    recipe = recipe_for(runs, parallel, teacher_outputs="stored" if read else "live", **settings)
    return recipe.model_copy(update={"teacher_logits": section})


def files_of(runs: Path) -> dict[str, bytes]:
    folder = runs / "tiny" / "teacher-logits"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.records"))}


def steps_of(runs: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (runs / "tiny" / "distill" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def written(pool: Pool, house: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`runs` with the stored outputs of one process."""
    runs = copy_of(house, tmp_path_factory.mktemp("stored") / "runs")
    pool.run(publish_stage, "teacher-logits", asked(runs), processes=1)
    return runs


def test_what_is_stored_is_what_the_plain_teacher_finds_likeliest(written: Path, measured: Record) -> None:
    artifact = find_artifact(written / "tiny", "teacher-logits")
    assert artifact is not None and artifact.result["samples"] == {"train": 16, "heldout": 5}
    teachers = StoredTeachers(artifact)
    plain = PlainModel(written / "tiny" / "import" / "checkpoint", SOURCE)
    data = written / "tiny" / "data"
    order = packed_samples(data / "train", samples=16, sequence_length=SEQUENCE, seed=1234, cache=written / "order")
    windows = evaluation_windows(data / "heldout", sequence_length=SEQUENCE, tokens=5 * SEQUENCE)
    for dataset, sample in ((order, 0), (order, 15), (windows, 0), (windows, 4)):
        tokens_S = dataset[sample][:-1]
        with torch.no_grad():
            log_q = plain.logits(tokens_S[None])[0].log_softmax(-1)
        expected, ids = log_q.topk(5, dim=-1)
        found = teachers.record(sample, tokens_S)
        assert isinstance(found, TopKRecord) and torch.equal(found.ids_SK.long(), ids)
        apart = (found.log_probs_SK.double() - expected).abs() / expected.abs()
        # fp16 has 11 significant bits; the model's own fp32 is far below
        assert measured("stored log-probabilities", "one", float(apart.max())) <= 2**-11 + 1e-5
        tail = 1 - expected.exp().sum(-1)
        assert relative_difference(found.log_tail_S.double().exp(), tail) <= 2e-3


@pytest.mark.parametrize("parallel", [DP2, CP2, PP2, pytest.param(PP2_VPP2, marks=pytest.mark.slow)], ids=name_of)
def test_every_layout_that_keeps_the_arithmetic_writes_the_same_bytes(
    pool: Pool, house: Path, written: Path, tmp_path: Path, parallel: Parallel
) -> None:
    runs = copy_of(house, tmp_path / "runs")
    pool.run(publish_stage, "teacher-logits", asked(runs, parallel), processes=parallel.processes)
    assert files_of(runs) == files_of(written) and len(files_of(runs)) == 8


@contextmanager
def broken_at(call: int, written: list[str]) -> Iterator[None]:
    """write_block notes what it is given and breaks off at one call."""
    original = stage.write_block

    def watched(path: Path, records: Any) -> None:
        if len(written) == call:
            raise KeyboardInterrupt
        written.append(f"{path.parent.name}/{path.name}")
        original(path, records)

    stage.write_block = watched
    try:
        yield
    finally:
        stage.write_block = original


def interrupted_and_continued(world: World, runs: Path) -> list[str]:
    """Blocks in the order in which they were written."""
    names: list[str] = []
    try:
        with broken_at(3, names):
            publish_stage(world, "teacher-logits", asked(runs))
    except KeyboardInterrupt:
        destroy_layout()
    with broken_at(-1, names):
        publish_stage(world, "teacher-logits", asked(runs, stored={"micro_batch": 1, "samples": 17}))
    return names


def test_an_interrupted_stage_writes_what_is_missing_and_a_longer_one_what_is_new(pool: Pool, house: Path, written: Path, tmp_path: Path) -> None:
    runs = copy_of(house, tmp_path / "runs")
    [names] = pool.run(interrupted_and_continued, runs, processes=1)
    assert len(names) == len(set(names)) == 8  # no block twice
    found, expected = files_of(runs), files_of(written)
    assert {name: found.get(name) for name in expected if "15-" not in name} == {name: data for name, data in expected.items() if "15-" not in name}
    assert "train/000000015-000000017.records" in found


def test_a_flipped_byte_is_found_and_its_block_alone_is_made_anew(pool: Pool, written: Path, tmp_path: Path) -> None:
    runs = copy_of(written, tmp_path / "runs")
    path = runs / "tiny" / "teacher-logits" / "train" / "000000003-000000006.records"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(WorkerError, match=r"000000003-000000006.records is damaged at sample 5; remove 000000003-000000006.records and make it anew"):
        pool.run(publish_stage, "distill", asked(runs), processes=1)
    assert finished(STAGES["teacher-logits"], asked(runs)) is not None
    path.unlink()
    assert finished(STAGES["teacher-logits"], asked(runs)) is None
    [names] = pool.run(blocks_written, runs, processes=1)
    assert names == [f"train/{path.name}"] and files_of(runs) == files_of(written)


def blocks_written(world: World, runs: Path) -> list[str]:
    names: list[str] = []
    with broken_at(-1, names):
        publish_stage(world, "teacher-logits", asked(runs))
    return names


def trained(pool: Pool, runs: Path, recipe: Recipe) -> list[dict[str, Any]]:
    pool.run(publish_stage, "distill", recipe, processes=recipe.parallel.processes)
    return steps_of(runs)


def apart(found: list[dict[str, Any]], expected: list[dict[str, Any]], of_found: str, of_expected: str) -> tuple[float, float]:
    """Largest relative difference of the first step's and validation's losses and gradient norm, and of all later losses."""

    def values(steps: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
        first = [steps[0]["validation"][name], steps[1][name], steps[1]["gradient_norm"]]
        return first, [step[name] for step in steps[2:]] + [steps[-1]["validation"][name]]

    (first, later), (wanted, wanted_later) = values(found, of_found), values(expected, of_expected)
    pairs = ((first, wanted), (later, wanted_later))
    first_apart, later_apart = (max(relative_difference(a, b) for a, b in zip(*pair, strict=True)) for pair in pairs)
    return first_apart, later_apart


def test_all_tokens_but_one_stored_in_fp32_teach_as_the_live_teacher_does(pool: Pool, house: Path, tmp_path: Path, measured: Record) -> None:
    runs, live = copy_of(house, tmp_path / "runs"), copy_of(house, tmp_path / "live")
    pool.run(publish_stage, "teacher-logits", asked(runs, TP2_SP, stored=ALL_BUT_ONE, temperature=1.0), processes=2)
    found = trained(pool, runs, asked(runs, stored=ALL_BUT_ONE))
    expected = trained(pool, live, asked(live, read=False))
    first, later = apart(found, expected, "forward_kl_top_k", "forward_kl")
    assert "forward_kl" not in found[1]
    # fp32: sums in other orders and the stored numbers' own rounding; later what Adam makes of that
    assert measured("stored against live: first step", "one", first) <= 1e-6
    assert measured("stored against live: later steps", "one", later) <= 1e-5


@pytest.mark.parametrize("parallel", [DP2, TP2_SP, PP2, CP2], ids=name_of)
def test_stored_top_k_teaches_as_live_top_k_does_under_other_layouts_and_micro_batches(
    pool: Pool, written: Path, live_top_5: list[dict[str, Any]], tmp_path: Path, parallel: Parallel, measured: Record
) -> None:
    runs = copy_of(written, tmp_path / "runs")
    found = trained(pool, runs, asked(runs, parallel, micro_batch=1))
    first, later = apart(found, live_top_5, "forward_kl_top_k", "forward_kl_top_k")
    # log-probabilities of 11 significant bits
    assert measured("stored top-k against live top-k: first step", name_of(parallel), first) <= 5e-4
    assert measured("stored top-k against live top-k: later steps", name_of(parallel), later) <= 1e-3
    assert "forward_kl" not in found[1]  # the KL over the whole vocabulary is not known


@pytest.fixture(scope="module")
def live_top_5(pool: Pool, house: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    runs = copy_of(house, tmp_path_factory.mktemp("live") / "runs")
    return trained(pool, runs, asked(runs, read=False, top_k=5))


def test_a_stored_sample_is_the_same_under_tensor_parallelism_and_estimates_the_kl(pool: Pool, house: Path, tmp_path: Path, measured: Record) -> None:
    """300 draws at temperature 2, written on two tensor ranks and on one; then a first step on each."""
    found = []
    for parallel in (ONE, TP2_SP):
        runs = copy_of(house, tmp_path / name_of(parallel))
        recipe = asked(
            runs,
            parallel,
            stored={"kind": "sample", "draws": 300, "temperature": 2.0},
            temperature=2.0,
            global_batch=16,
            steps=1,
            learning_rate={"warmup_steps": 0},
        )
        pool.run(publish_stage, "teacher-logits", recipe, processes=parallel.processes)
        found.append((files_of(runs), trained(pool, runs, recipe)))
    (one_files, one), (two_files, two) = found
    # counts are the same but where a draw lies on a border within rounding: then a file is not
    assert sum(one_files[name] != two_files[name] for name in one_files) <= 8
    first, _ = apart([*two, two[1]], [*one, one[1]], "forward_kl_sampled", "forward_kl_sampled")
    assert measured("stored sample: first step", name_of(TP2_SP), first) <= 1e-4


def test_samples_that_nobody_stored_are_told_before_the_start_with_the_command_that_stores_them(pool: Pool, written: Path, tmp_path: Path) -> None:
    runs = copy_of(written, tmp_path / "runs")
    more = asked(runs, steps=7)
    assert finished(STAGES["teacher-logits"], asked(runs)) is not None and finished(STAGES["teacher-logits"], more) is None
    with pytest.raises(
        WorkerError,
        match=r"train has 16 samples and this run reads 28; store the rest with: minitron teacher-logits RECIPE teacher_logits.samples=28",
    ):
        pool.run(publish_stage, "distill", more, processes=1)


def test_the_stage_is_part_of_a_chain_that_has_its_section_and_takes_the_teachers_place(tmp_path: Path) -> None:
    plain, live, stored = recipe_for(tmp_path), asked(tmp_path, read=False), asked(tmp_path)
    assert not is_asked(STAGES["teacher-logits"], plain) and is_asked(STAGES["teacher-logits"], stored)
    corrected = {"correct": {"steps": 3, "source_peak": 1e-3}}
    with_correction = [Recipe(**{**recipe.model_dump(by_alias=True), **corrected}) for recipe in (live, stored)]
    of_live, of_stored = (stage_inputs(STAGES["distill"], recipe) for recipe in with_correction)
    assert "correct" in of_live and "teacher-logits" not in of_live
    assert "correct" not in of_stored and "teacher-logits" in of_stored
    assert "correct" in stage_inputs(STAGES["teacher-logits"], with_correction[1])
