"""Messages that say nothing to a user of this tool, silenced one by one; everything else still reaches the console."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass


@dataclass(frozen=True)
class KnownWarning:
    """start: how the message begins (a regular expression); module: who is named as its source."""

    start: str
    module: str
    reason: str


@dataclass(frozen=True)
class KnownRecord:
    """contains: a part of the log message; logger: the logger that it is sent to."""

    contains: str
    logger: str
    reason: str


def silence_known_noise() -> None:
    """Filter the known messages; a second call adds nothing (warnings' own filter list drops doubles)."""
    for known in known_warnings():
        warnings.filterwarnings("ignore", message=known.start, module=known.module)
    for record in known_records():
        logger = logging.getLogger(record.logger)
        if not any(isinstance(present, _Without) and present.contains == record.contains for present in logger.filters):
            logger.addFilter(_Without(record.contains))


def known_warnings() -> tuple[KnownWarning, ...]:
    """What megatron-core 0.16 to 0.19 say through `warnings`, and why a user need not read it."""
    chosen = "`doctor` says what is installed; the layer spec and the flags are chosen by it"
    return (
        KnownWarning("Transformer Engine and Apex are not installed", r"megatron\.core\.", chosen),
        KnownWarning("Apex is not installed", r"megatron\.core\.", chosen),
        KnownWarning("full scope is deprecated", r"megatron\.core\.", "CUDA graphs; the config's own default"),
        KnownWarning("absl.logging is not installed", r"megatron\.core\.", "it uses logging then, as it should"),
        KnownWarning("MimoModelConfig is experimental", r"megatron\.core\.", "imported by the schedules, not used"),
        KnownWarning("`load_state_dict` is deprecated", r"megatron\.core\.dist_checkpointing", "a call inside megatron"),
        KnownWarning("The argument order of load has been changed", r"torch\.distributed\.checkpoint", "as above"),
        KnownWarning(
            "`torch.distributed.(reduce_scatter|all_gather_into)_tensor`",
            r"torch\.distributed\.",
            "calls inside megatron",
        ),
        KnownWarning("The .grad attribute of a Tensor that is not a leaf", r"megatron\.core\.optimizer", "it only looks"),
        # the common state and single-process conversions are read by one process on purpose
        KnownWarning("torch.distributed is disabled, unavailable", r"torch\.distributed\.checkpoint", "one reader is intended"),
    )


def known_records() -> tuple[KnownRecord, ...]:
    """The same for `logging`."""
    return (
        KnownRecord("CPU RNG state changed", "megatron.core.tensor_parallel.random", "on CPU both generators are one"),
        KnownRecord("load_common is deprecated", "megatron.core.dist_checkpointing.strategies.common", "0.19 reads 0.16"),
        KnownRecord("GPTModel IS DEPRECATED", "megatron.core.models.gpt.gpt_model", "versions.py bounds the releases"),
        KnownRecord(
            "full_param_layout not provided",
            "megatron.core.distributed.distributed_data_parallel",
            "it computes the same one",
        ),
        KnownRecord(
            "MCore's async save is deprecated",
            "megatron.core.dist_checkpointing.strategies.torch",
            "needs no extra package",
        ),
        KnownRecord("No CUDA runtime is found", "torch.utils.cpp_extension", "said for a CUDA build of torch without a GPU"),
    )


class _Without(logging.Filter):
    """Drops the records that contain one text."""

    def __init__(self, contains: str) -> None:
        super().__init__()
        self.contains = contains

    def filter(self, record: logging.LogRecord) -> bool:
        return self.contains not in record.getMessage()
