"""A teacher's stored outputs in the place of a teacher: read by sample id, on the student's last stage, whatever wrote them.

Legend: S sequence, B samples of a micro-batch, N = S × B its tokens, K and U classes of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_megatron.artifact import Artifact
from minitron_megatron.config.schema import Recipe
from minitron_megatron.data.batches import Batch, MicroBatches, TokenDataset
from minitron_megatron.errors import ArchitectureError, ArtifactError
from minitron_megatron.parallel.context import part_of_rank
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.stored.blocks import Entry, block_path, mend, read_record, read_table, text_digest
from minitron_megatron.stored.records import OutputFormat, Record, SampleRecord, TopKRecord
from minitron_megatron.training.losses.stored import StoredSample, StoredTopK
from minitron_megatron.training.losses.target import Target
from minitron_megatron.training.teachers import Load


class StoredTeachers:
    """In the teachers' place: nothing runs ahead, and nothing is exchanged."""

    identity = ""

    def __init__(self, artifact: Artifact, *, weight: float = 1.0, student: Layout | None = None) -> None:
        """weight: of the teacher's losses, where the recipe names one. student: whose context ranks each want their own tokens of a sample."""
        self.form = OutputFormat(**artifact.result["format"])
        self.samples: dict[str, int] = artifact.result["samples"]
        self._folder, self._weight = artifact.path, weight
        self._context = (student.context_rank, student.context) if student else (0, 1)
        self._table = lru_cache(maxsize=64)(read_table)

    def states(self, groups: MicroBatches, load: Load, wanted: Sequence[Any] = ()) -> StoredStates:
        return StoredStates(self, load)

    def renew(self) -> None:
        """What is stored does not change."""

    def describe(self) -> str:
        return "stored"

    def target(self, batch: Batch) -> Target:
        """Of whole sequences; for each sample, the places of this context rank."""
        records = [self.record(sample, batch.tokens_BS[place]) for place, sample in enumerate(batch.sample_ids_B.tolist())]
        own = [_part_of_record(record, *self._context) for record in records]
        return _target(own, self.form, self._weight, batch.tokens_BS.device)

    def record(self, sample_id: int, tokens_S: Tensor) -> Record:
        """Of the part, training or held-out, whose sample of this id has this text: outputs follow from the text alone.

        Raises ArtifactError where there is none, and for damaged files.
        """
        text = text_digest(tokens_S)
        for part, samples in self.samples.items():
            if sample_id < samples:
                path, entry = self._entry(part, sample_id)
                if entry.text == text:
                    return self.form.decode(read_record(path, entry, sample_id))
        raise ArtifactError(
            f"{self._folder}: nothing is stored of sample {sample_id} with this text; what was tokenized or the order of samples has changed: "
            "remove the folder and make it anew with: minitron teacher-logits RECIPE"
        )

    def _entry(self, part: str, sample_id: int) -> tuple[Path, Entry]:
        size = self.form.block_samples
        start = sample_id // size * size
        path = block_path(self._folder / part, range(start, min(start + size, self.samples[part])))
        entries = self._table(path)
        if sample_id - start >= len(entries):
            raise ArtifactError(f"{path} is damaged; {mend(path)}")
        return path, entries[sample_id - start]

    def require(self, *, vocab: int, training: TokenDataset, heldout: TokenDataset) -> None:
        """Raises, before the start, for another vocabulary than the student's, and for samples that nobody stored."""
        if self.form.vocab != vocab:
            raise ArchitectureError(
                f"the student's vocabulary of {vocab} is not the stored teacher's of {self.form.vocab}; distil from a teacher with the same tokenizer"
            )
        for part, dataset, mend_it in (
            ("train", training, f"teacher_logits.samples={len(training)}"),
            ("heldout", heldout, "distill.validation_samples as in this run"),
        ):
            if len(dataset) > self.samples[part]:
                raise ArtifactError(
                    f"{self._folder / part} has {self.samples[part]} samples and this run reads {len(dataset)}; store the rest with: "
                    f"minitron teacher-logits RECIPE {mend_it}"
                )


class StoredStates:
    """What is stored of one global batch."""

    def __init__(self, teachers: StoredTeachers, load: Load) -> None:
        self._teachers, self._load = teachers, load

    def targets(self, batch: Batch) -> list[Target]:
        """Read when they are asked for: a sample is some hundred kilobytes."""
        return [self._teachers.target(self._load(tuple(batch.sample_ids_B.tolist())))]


def stored_teachers(recipe: Recipe, artifact: Artifact, student: Layout) -> StoredTeachers:
    """With the weight of the recipe's one teacher."""
    return StoredTeachers(artifact, weight=recipe.teachers.models[0].weight if recipe.teachers else 1.0, student=student)


def _part_of_record(record: Record, context_rank: int, context_size: int) -> Record:
    rows = [part_of_rank(values, 0, context_rank, context_size) for values in record]
    return TopKRecord(*rows) if isinstance(record, TopKRecord) else SampleRecord(*rows)


def _target(records: Sequence[Record], form: OutputFormat, weight: float, device: torch.device) -> Target:
    """Tokens in the order of hidden states [S, B, D] with their first two dimensions made one."""

    def joined(values: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(values), dim=1).flatten(0, 1).to(device, non_blocking=True)

    if form.kind == "sample":
        drawn = [record for record in records if isinstance(record, SampleRecord)]
        widest = max(record.ids_SU.shape[1] for record in drawn)
        ids, counts = (joined([_widened(values, widest) for values in column]) for column in list(zip(*drawn, strict=True))[:2])
        return StoredSample(ids, counts.float() / form.classes, joined([record.entropy_S for record in drawn]), weight)
    kept = [record for record in records if isinstance(record, TopKRecord)]
    ids, log_probs, tails = (joined(column) for column in zip(*kept, strict=True))
    return StoredTopK(ids, log_probs, tails, weight)


def _widened(values_SU: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values_SU, (0, width - values_SU.shape[1]))
