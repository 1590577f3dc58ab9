"""A run folder with everything that the distributed stages read: a tiny source model and a tiny corpus as published artifacts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.arch.hf_config import SIZES
from minitron_megatron.artifact import FORMAT, Artifact, find_artifact
from minitron_megatron.chain import STAGES, run_stage, stage_settings
from minitron_megatron.config.distill import Distill, LearningRate, Training
from minitron_megatron.config.importance import Importance
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.config.prune import Prune, Target
from minitron_megatron.config.schema import Recipe
from minitron_megatron.config.source import Data, Model
from minitron_megatron.parallel.world import World

from .tiny import LLAMA, ONE, SEQUENCE, VOCAB, teacher_of, write_random

SOURCE = teacher_of(LLAMA)
TARGET = SOURCE.resized(layers=5, hidden=24, ffn=40, heads=4)
CALIBRATION = 35
"""Two blocks of 16 samples and one of 3: the last micro-batch is smaller than the others."""
STEPS = 20


def recipe_for(runs: Path, parallel: Parallel = ONE, precision: str = "fp32", *, micro_batch: int = 1, **distill: Any) -> Recipe:
    defaults: dict[str, Any] = {
        "steps": STEPS,
        "sequence_length": SEQUENCE,
        "global_batch": 4,
        "micro_batch": 2,
        "learning_rate": LearningRate(peak=3e-3, minimum=3e-4, warmup_steps=3),
        "save_every_steps": 8,
        "validate_every_steps": 6,
        "validation_samples": 5,
        "loss_chunk_tokens": 7,
    }
    return Recipe(
        name="tiny",
        runs=str(runs),
        platform="cpu",
        precision=precision,  # type: ignore[arg-type]
        model=Model(path="nowhere"),
        data=Data(train=["nothing"]),
        parallel=parallel,
        importance=Importance(samples=CALIBRATION, sequence_length=SEQUENCE, micro_batch=micro_batch),
        prune=Prune(target=Target(layers=TARGET.layers, hidden=TARGET.hidden, ffn=TARGET.ffn, heads=TARGET.heads)),
        distill=Distill(**{**defaults, **distill}),
        # an asynchronous writer of so small a run is not through when a test stops it: it would start anew and show nothing
        training=Training(asynchronous_checkpoints=False),
    )


def build_house(runs: Path, source: Architecture = SOURCE) -> None:
    """Publishes `import` and `data` below runs/tiny."""
    folder = runs / "tiny"
    digest = write_random(folder / "import" / "checkpoint", source, scale=0.2)
    config = {"model_type": source.family_name, **{theirs: getattr(source, ours) for ours, theirs in SIZES.items()}}
    (folder / "import" / "hf_config.json").write_text(json.dumps(config))
    put_manifest(folder, "import", {"architecture": source.to_dict(), "weights_sha256": digest})
    (folder / "data").mkdir()
    write_corpus(folder / "data" / "train", documents=60, seed=1)
    write_corpus(folder / "data" / "heldout", documents=6, seed=2)
    put_manifest(folder, "data", {"parts": {"train": {"sha256": "train-1"}, "heldout": {"sha256": "heldout-1"}}, "eod": 0, "vocab_size": VOCAB})


def put_manifest(folder: Path, stage: str, result: dict[str, Any]) -> None:
    settings = stage_settings(STAGES[stage], recipe_for(folder.parent))
    manifest = {"stage": stage, "id": f"{stage}-1", "format": FORMAT, "settings": settings, "inputs": {}}
    (folder / stage / "manifest.json").write_text(json.dumps(manifest))
    (folder / stage / "result.json").write_text(json.dumps(result))


def write_corpus(prefix: Path, *, documents: int, seed: int) -> None:
    """Random documents in which small ids are frequent, so that there is something to learn."""
    random = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in random.integers(10, 60, documents):
        ids = torch.from_numpy(np.append(random.zipf(1.5, length) % (VOCAB - 1) + 1, 0).astype(np.int64))
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")


def copy_of(house: Path, runs: Path) -> Path:
    """The same artifacts in another run folder, so that runs do not meet."""
    shutil.copytree(house, runs)
    return runs


def inputs_of(runs: Path, *stages: str) -> dict[str, Artifact]:
    found = {stage: find_artifact(runs / "tiny", stage) for stage in stages}
    return {stage: artifact for stage, artifact in found.items() if artifact is not None}


def publish_stage(world: World, stage: str, recipe: Recipe) -> None:
    run_stage(STAGES[stage], recipe, "RECIPE", world)
