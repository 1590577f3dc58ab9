"""Teacher correction, and fine-tuning: stages that train without a teacher. And a teacher that is corrected while it teaches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron_megatron.artifact import FORMAT, find_artifact
from minitron_megatron.chain import STAGES, stage_settings
from minitron_megatron.checkpoint.torch_dist import MegatronSource, weights_digest
from minitron_megatron.config.chat import Chat
from minitron_megatron.config.correct import Correct
from minitron_megatron.config.distill import Training
from minitron_megatron.config.finetune import Finetune
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.config.schema import Recipe
from minitron_megatron.data.encode import EncodedBlock
from minitron_megatron.data.index import write_block
from minitron_megatron.errors import ArtifactError
from minitron_megatron.parallel.world import World
from minitron_megatron.training.loop import TrainingLoop
from minitron_megatron.training.snapshots import MARK

from .conftest import Identical, Record
from .house import SOURCE, STEPS, TARGET, copy_of, publish_stage, recipe_for
from .pool import Pool
from .test_distill import TIMED, Interrupted, changed, distill_until
from .tiny import DP2, ONE, PP2, SEQUENCE, TP2_SP, VOCAB, layout_name, name_of, relative_difference

RUN: dict[str, Any] = {
    "steps": STEPS,
    "sequence_length": SEQUENCE,
    "global_batch": 4,
    "micro_batch": 2,
    "save_every_steps": 8,
    "validate_every_steps": 6,
    "validation_samples": 5,
    "loss_chunk_tokens": 7,
}
RATE = {"peak": 3e-3, "minimum": 3e-4, "warmup_steps": 3}
STUDENT = {"correct": SOURCE, "finetune": TARGET}


def recipe_with(runs: Path, parallel: Parallel = ONE, *, beside: bool = False, **distill: Any) -> Recipe:
    sections = {
        "correct": Correct(**RUN, source_peak=1.5e-2, learning_rate={"minimum": 3e-4, "warmup_steps": 3}, beside=beside),
        "chat": Chat(train=["nothing"]),
        "finetune": Finetune(**RUN, learning_rate=RATE),
    }
    return recipe_for(runs, parallel, **distill).model_copy(update=sections)


def write_chats(folder: Path, recipe: Recipe) -> None:
    """A chat artifact: random conversations whose second halves count, each in its own measure."""
    folder.mkdir()
    random = np.random.default_rng(4)
    for part, number in (("train", 40), ("heldout", 9)):
        lengths = random.integers(6, SEQUENCE, number).astype(np.int32)
        tokens = np.concatenate([random.zipf(1.5, length) % (VOCAB - 1) + 1 for length in lengths]).astype(np.uint16)
        weights = np.concatenate([np.arange(length) >= length // 2 for length in lengths]).astype(np.float32)
        write_block(folder / part, EncodedBlock(tokens, lengths, weights * 0.5))
    manifest = {"stage": "chat", "id": "chat-1", "format": FORMAT, "settings": stage_settings(STAGES["chat"], recipe), "inputs": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "result.json").write_text(json.dumps({"packing": "best_fit"}))


@pytest.fixture(scope="module")
def furnished(pool: Pool, house: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The house with a chat artifact and with the pruned model in the distilled one's place."""
    runs = copy_of(house, tmp_path_factory.mktemp("furnished") / "runs")
    recipe = recipe_with(runs)
    write_chats(runs / "tiny" / "chat", recipe)
    folder = shutil.copytree(runs / "tiny" / "prune", runs / "tiny" / "distill")
    manifest = {"stage": "distill", "id": "distill-1", "format": FORMAT, "settings": stage_settings(STAGES["distill"], recipe), "inputs": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return runs


def records(runs: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (runs / "tiny" / stage / "metrics.jsonl").read_text().splitlines()]


def bits(runs: Path, stage: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in TIMED} for record in records(runs, stage)]


def digest(runs: Path, stage: str) -> str:
    return weights_digest(MegatronSource(runs / "tiny" / stage / "checkpoint", STUDENT[stage]))


def stop_at(world: World, stage: str, recipe: Recipe, finished: int) -> None:
    distill_until(world, recipe, finished, stage)


Whole = Callable[[str, Parallel], Path]


@pytest.fixture(scope="module")
def whole(pool: Pool, furnished: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """whole(stage, layout): runs of the uninterrupted stage, made once."""
    made: dict[tuple[str, str], Path] = {}

    def run(stage: str, parallel: Parallel) -> Path:
        key = stage, layout_name(parallel)
        if key not in made:
            made[key] = copy_of(furnished, tmp_path_factory.mktemp("whole") / "runs")
            pool.run(publish_stage, stage, recipe_with(made[key], parallel), processes=parallel.processes)
        return made[key]

    return run


@pytest.mark.parametrize(
    ("stage", "parallel"),
    [
        ("correct", PP2),
        ("finetune", DP2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("correct", TP2_SP), ("correct", DP2), ("finetune", TP2_SP), ("finetune", PP2))),
    ],
    ids=name_of,
)
def test_twenty_steps_without_a_teacher_agree_in_every_layout(whole: Whole, measured: Record, stage: str, parallel: Parallel) -> None:
    """The first step to 1e-5. Later ones drift by what Adam makes of rounding: 1e-4 in a correction, as in a distillation, 1e-3 in a fine-tuning,
    where a third of the tokens count; another sample would be 1e-1."""
    one, found = ([record for record in records(whole(stage, layout), stage) if record["step"]] for layout in (ONE, parallel))
    assert one[-1]["validation"]["cross_entropy"] < 0.95 * records(whole(stage, ONE), stage)[0]["validation"]["cross_entropy"]  # it learns
    assert all(record["loss"] == record["cross_entropy"] and "forward_kl" not in record for record in found)
    for name in ("loss", "gradient_norm", "learning_rate"):
        differences = [relative_difference(a[name], b[name]) for a, b in zip(found, one, strict=True)]
        assert differences[0] <= 1e-5
        assert measured(f"20 steps of {stage}: {name}", layout_name(parallel), max(differences)) <= {"correct": 1e-4, "finetune": 1e-3}[stage]


@pytest.mark.parametrize(
    ("stage", "parallel"), [("correct", PP2), ("finetune", DP2), pytest.param("finetune", TP2_SP, marks=pytest.mark.slow)], ids=name_of
)
def test_an_interrupted_run_without_a_teacher_is_the_whole_one_to_the_bit(
    pool: Pool, furnished: Path, whole: Whole, tmp_path: Path, identical: Identical, stage: str, parallel: Parallel
) -> None:
    expected, runs = whole(stage, parallel), copy_of(furnished, tmp_path / "runs")
    recipe = recipe_with(runs, parallel)
    pool.run(stop_at, stage, recipe, 13, processes=parallel.processes)
    pool.run(publish_stage, stage, recipe, processes=parallel.processes)
    same = bits(runs, stage) == bits(expected, stage) and digest(runs, stage) == digest(expected, stage)
    assert identical(f"an interrupted and resumed {stage}, as the whole one", layout_name(parallel), same)


def test_the_corrections_rate_is_a_fifth_of_the_sources(whole: Whole) -> None:
    """P2, section 4: the peak comes at the end of the warm-up."""
    assert max(record.get("learning_rate", 0) for record in records(whole("correct", ONE), "correct")) == pytest.approx(1.5e-2 / 5)


def test_a_distillation_with_a_corrected_teacher_is_one_from_a_source_with_the_corrected_weights(
    pool: Pool, furnished: Path, whole: Whole, tmp_path: Path
) -> None:
    """The reference has the corrected weights in the place of the imported ones and no correction: the same bits; with the source they differ."""
    corrected, swapped = copy_of(furnished, tmp_path / "corrected"), copy_of(furnished, tmp_path / "swapped")
    shutil.copytree(whole("correct", ONE) / "tiny" / "correct", corrected / "tiny" / "correct")
    shutil.rmtree(swapped / "tiny" / "import" / "checkpoint")
    shutil.copytree(whole("correct", ONE) / "tiny" / "correct" / "checkpoint", swapped / "tiny" / "import" / "checkpoint")
    with_correction = recipe_with(corrected, steps=4, learning_rate=RATE)
    for recipe in (with_correction, recipe_for(swapped, steps=4, learning_rate=RATE)):
        pool.run(publish_stage, "distill", recipe, processes=1)
    assert bits(corrected, "distill") == bits(swapped, "distill")
    plain = copy_of(furnished, tmp_path / "plain")
    pool.run(publish_stage, "distill", recipe_for(plain, steps=4, learning_rate=RATE), processes=1)
    assert bits(corrected, "distill") != bits(plain, "distill")


def publishing(world: World, recipe: Recipe, waiting: Path, when: dict[int, str], finished: int = STEPS) -> None:
    """Distils until so many steps are behind it; the correction beside it publishes what lies waiting at the beginning of the given steps."""
    take_step = TrainingLoop._step

    def make(_: Any) -> Any:
        def step_and_publish(self: TrainingLoop, step: int) -> dict[str, Any]:
            if step == finished:
                raise Interrupted
            if world.is_main and step in when:
                publish_by_hand(Path(recipe.runs), waiting, when[step])
            world.barrier()
            return take_step(self, step)

        return step_and_publish

    with changed(TrainingLoop, "_step", make):
        if finished == STEPS:
            publish_stage(world, "distill", recipe)
        else:
            with pytest.raises(Interrupted):
                publish_stage(world, "distill", recipe)


def publish_by_hand(runs: Path, waiting: Path, step: str) -> None:
    [snapshot] = waiting.glob(f"*-{step}")
    shutil.copytree(snapshot, runs / "tiny" / "corrected" / snapshot.name)


@pytest.mark.slow
def test_a_distillation_beside_its_teachers_correction_takes_up_what_is_published_and_resumes_with_what_it_had(
    pool: Pool, furnished: Path, tmp_path: Path, identical: Identical
) -> None:
    """Snapshots of steps 8, 16 and 20 come at steps 0, 5 and 13; it looks at its own saves, behind steps 8 and 16. The interrupted run comes
    back when all are there, and must begin with the one that it had. One that comes at step 18 teaches nothing and is not named."""
    runs = copy_of(furnished, tmp_path / "runs")
    recipe = recipe_with(runs, PP2, beside=True)
    shutil.rmtree(runs / "tiny" / "distill")
    pool.run(publish_stage, "correct", recipe.model_copy(update={"correct": recipe.correct.model_copy(update={"keep_snapshots": 3})}), processes=2)
    waiting = (runs / "tiny" / "corrected").rename(tmp_path / "waiting")
    ids = sorted(folder.name for folder in waiting.iterdir())
    assert [name[-8:] for name in ids] == ["00000008", "00000016", "00000020"]
    shutil.copytree(waiting / ids[2], waiting / ids[2].replace("00000020", "00000024"))
    assert find_artifact(runs / "tiny", "correct")
    shutil.rmtree(runs / "tiny" / "correct")  # the distillation must not need it
    broken = copy_of(runs, tmp_path / "broken")
    for place in (runs, broken):
        (place / "tiny" / "corrected").mkdir()
    when = {5: "00000016", 13: "00000020", 18: "00000024"}
    publish_by_hand(runs, waiting, "00000008")
    pool.run(publishing, recipe, waiting, when, processes=2)
    teachers = [record.get("teacher") for record in records(runs, "distill")]
    assert teachers[1:] == [ids[0]] * 8 + [ids[1]] * 8 + [ids[2]] * 4
    assert find_artifact(runs / "tiny", "distill").result["teacher"] == ids[2]  # type: ignore[union-attr]

    again = recipe_with(broken, PP2, beside=True)
    publish_by_hand(broken, waiting, "00000008")
    pool.run(publishing, again, waiting, when, 14, processes=2)
    marked = sorted(mark.parent.name for mark in (broken / "tiny" / "corrected").glob(f"*/{MARK}"))
    assert marked == ids[:2]  # the newest checkpoint, of step 8, continues with the second
    pool.run(publish_stage, "distill", again, processes=2)
    assert identical("a distillation beside its teacher's correction, interrupted", "pp2", bits(broken, "distill") == bits(runs, "distill"))


@pytest.mark.slow
def test_what_is_published_behind_the_last_step_is_the_corrected_model(pool: Pool, furnished: Path, tmp_path: Path) -> None:
    """Also while a checkpoint is written beside it and the last step's weights are still coming in (overlap_param_gather)."""
    runs = copy_of(furnished, tmp_path / "runs")
    training = Training(overlap_grad_reduce=True, overlap_param_gather=True, asynchronous_checkpoints=True)
    pool.run(publish_stage, "correct", recipe_with(runs, DP2, beside=True).model_copy(update={"training": training}), processes=2)
    before, last = sorted((runs / "tiny" / "corrected").iterdir())
    digests = [weights_digest(MegatronSource(folder / "checkpoint", SOURCE)) for folder in (before, last)]
    assert digests[1] == digest(runs, "correct") != digests[0]


def distil_and_tell(world: World, recipe: Recipe) -> str:
    with pytest.raises(ArtifactError) as caught:
        publish_stage(world, "distill", recipe)
    return str(caught.value)


@pytest.mark.slow
def test_a_resumed_distillation_whose_teacher_is_gone_says_so(pool: Pool, furnished: Path, whole: Whole, tmp_path: Path) -> None:
    runs = copy_of(furnished, tmp_path / "runs")
    shutil.rmtree(runs / "tiny" / "distill")
    recipe = recipe_with(runs, beside=True, steps=9, learning_rate=RATE)
    pool.run(publish_stage, "correct", recipe, processes=1)
    pool.run(stop_at, "distill", recipe, 8, processes=1)
    shutil.rmtree(runs / "tiny" / "corrected")
    assert "the teacher that this distillation had is not there" in pool.run(distil_and_tell, recipe, processes=1)[0]
