"""Artifacts: published whole or not at all, resumed where nothing changed, and no trace of a user's mistake."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from minitron_megatron.artifact import artifact_id, draft, find_artifact, open_artifact, partial_folder, publish, require_disk_space, write_json
from minitron_megatron.errors import ArtifactError, PlanError, TrainingError


def everything_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def interrupted(folder: Path, identity: str, file: str) -> None:
    with pytest.raises(KeyboardInterrupt), draft(folder, "prune", identity) as partial:
        (partial / file).write_text("half")
        raise KeyboardInterrupt


def test_a_stage_appears_under_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tiny"
    with draft(run, "prune", "abc") as partial:
        (partial / "weights").write_text("w")
        assert find_artifact(run, "prune") is None
        published = publish(run, "prune", {"id": "abc"}, {"summary": "done"})
    assert everything_in(run) == {"prune", "prune/weights", "prune/manifest.json", "prune/result.json"}  # no partial, no old, no stamp
    assert (published.id, published.result) == ("abc", {"summary": "done"})
    assert open_artifact(run, "prune").manifest == json.loads((run / "prune" / "manifest.json").read_text())


def test_a_second_publication_replaces_every_file_of_the_first(tmp_path: Path) -> None:
    for identity, file in (("old", "a"), ("new", "b")):
        with draft(tmp_path, "prune", identity) as partial:
            (partial / file).write_text(identity)
            publish(tmp_path, "prune", {"id": identity}, {})
    assert everything_in(tmp_path) == {"prune", "prune/b", "prune/manifest.json", "prune/result.json"}
    assert open_artifact(tmp_path, "prune").id == "new"


def test_the_published_artifact_stays_readable_while_its_successor_is_made(tmp_path: Path) -> None:
    with draft(tmp_path, "prune", "old"):
        publish(tmp_path, "prune", {"id": "old"}, {"n": 1})
    interrupted(tmp_path, "new", "half")
    assert open_artifact(tmp_path, "prune").result == {"n": 1}


def test_a_rename_that_fails_does_not_lose_the_older_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine may stop at any point: either the old or the new files are there afterwards, never a mixture."""
    with draft(tmp_path, "prune", "old"):
        publish(tmp_path, "prune", {"id": "old"}, {})
    monkeypatch.setattr(Path, "rename", lambda self, target: (_ for _ in ()).throw(OSError("stopped")))
    with pytest.raises(OSError, match="stopped"), draft(tmp_path, "prune", "new"):
        publish(tmp_path, "prune", {"id": "new"}, {})
    assert open_artifact(tmp_path, "prune").id == "old"


def test_an_interrupted_stage_finds_its_files_again_when_nothing_changed(tmp_path: Path) -> None:
    interrupted(tmp_path, "same", "step-100")
    with draft(tmp_path, "prune", "same") as partial:
        assert (partial / "step-100").read_text() == "half"


def test_files_of_other_settings_are_never_resumed(tmp_path: Path) -> None:
    interrupted(tmp_path, "before", "step-100")
    with draft(tmp_path, "prune", "after") as partial:
        assert not (partial / "step-100").exists()


def test_a_partial_folder_without_its_stamp_is_not_trusted(tmp_path: Path) -> None:
    partial_folder(tmp_path, "prune").mkdir()
    (partial_folder(tmp_path, "prune") / "half").write_text("x")
    with draft(tmp_path, "prune", "id") as partial:
        assert not (partial / "half").exists()


@pytest.mark.parametrize("deep", ["tiny", "runs/tiny", "a/b/c/tiny"])
def test_a_users_mistake_leaves_not_even_an_empty_folder(deep: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError), draft(tmp_path / deep, "prune", "id") as partial:
        (partial / "half").write_text("x")
        raise PlanError("no")
    assert everything_in(tmp_path) == set()


def test_a_users_mistake_leaves_folders_that_others_made(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    with pytest.raises(PlanError), draft(runs / "tiny", "prune", "id"):
        raise PlanError("no")
    assert everything_in(tmp_path) == {"runs"}
    with draft(runs / "tiny", "import", "x"):
        publish(runs / "tiny", "import", {"id": "x"}, {})
    before = everything_in(tmp_path)
    with pytest.raises(PlanError), draft(runs / "tiny", "prune", "id"):
        raise PlanError("no")
    assert everything_in(tmp_path) == before


def test_a_users_mistake_does_not_throw_away_what_an_earlier_start_did(tmp_path: Path) -> None:
    """Hours of training must survive a restart on, say, the wrong number of processes."""
    interrupted(tmp_path, "same", "step-100")
    with pytest.raises(PlanError), draft(tmp_path, "prune", "same"):
        raise PlanError("wrong number of processes")
    with draft(tmp_path, "prune", "same") as partial:
        assert (partial / "step-100").exists()


def test_another_failure_keeps_the_files_for_the_next_start(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), draft(tmp_path, "distill", "id") as partial:
        (partial / "step-100").write_text("x")
        raise RuntimeError("out of memory")
    assert (partial_folder(tmp_path, "distill") / "step-100").exists()


def test_a_missing_and_an_unfinished_input_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"prune does not exist; make it with: minitron prune configs/a\.yaml$"):
        open_artifact(tmp_path, "prune", "configs/a.yaml")
    interrupted(tmp_path, "id", "half")
    with pytest.raises(ArtifactError, match=r"prune is unfinished; make it with: minitron prune configs/a\.yaml$"):
        open_artifact(tmp_path, "prune", "configs/a.yaml")


def test_an_artifact_of_another_format_is_refused(tmp_path: Path) -> None:
    with draft(tmp_path, "prune", "id"):
        publish(tmp_path, "prune", {"id": "id"}, {})
    write_json(tmp_path / "prune" / "manifest.json", {"id": "id", "format": 0})
    with pytest.raises(ArtifactError, match="another version of this tool"):
        open_artifact(tmp_path, "prune")


def test_the_id_changes_with_settings_inputs_and_outside_files_and_with_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_text("1234")
    os.utime(file, ns=(1, 1))
    first = artifact_id("prune", {"a": 1, "b": 2}, {"import": "x"}, [file])
    assert artifact_id("prune", {"b": 2, "a": 1}, {"import": "x"}, [file]) == first
    others = [
        artifact_id("distill", {"a": 1, "b": 2}, {"import": "x"}, [file]),
        artifact_id("prune", {"a": 1, "b": 3}, {"import": "x"}, [file]),
        artifact_id("prune", {"a": 1, "b": 2}, {"import": "y"}, [file]),
        artifact_id("prune", {"a": 1, "b": 2}, {"import": "x"}, []),
    ]
    os.utime(file, ns=(1, 2))
    others.append(artifact_id("prune", {"a": 1, "b": 2}, {"import": "x"}, [file]))
    assert len({first, *others}) == 6


def test_the_order_in_which_outside_files_are_found_does_not_matter(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_text("x")
    assert artifact_id("data", {}, {}, files) == artifact_id("data", {}, {}, files[::-1])


def test_too_little_disk_space_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(Path(path))
        return SimpleNamespace(free=1_000_000_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    folder = tmp_path / "not" / "yet" / "there"
    with pytest.raises(ArtifactError, match=r"no disk space for the model: 2\.0 GB needed, 1\.0 GB free; free some, or set runs=FOLDER"):
        require_disk_space(folder, 2_000_000_000, "the model")
    require_disk_space(folder, 1_000_000_000, "the model")  # exactly as much as is free
    assert asked == [tmp_path, tmp_path]  # the disk on which the folder would be made
    assert everything_in(tmp_path) == set()


def test_a_run_that_went_wrong_keeps_its_work_for_the_next_start(tmp_path: Path) -> None:
    """A loss that is not finite after hours: the checkpoints before it are what a lower learning rate starts from, or an expert looks at."""
    with pytest.raises(TrainingError), draft(tmp_path, "distill", "abc") as partial:
        (partial / "step_1").write_text("weights")
        raise TrainingError("not finite")
    with draft(tmp_path, "distill", "abc") as partial:
        assert (partial / "step_1").read_text() == "weights"
