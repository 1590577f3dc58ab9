"""How a process that fails tells its launcher why, and how the launcher finds, among all that failed, the one that failed first.

A process that dies takes its connections along, so that the others fail a moment later: their errors are only consequences.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from minitron_megatron.artifact import write_json
from minitron_megatron.errors import MinitronError

Kind = Literal["mistake", "defect", "timeout", "lost"]
"""mistake: the user's, one line; defect: anything else of its own; timeout, lost: another process did not answer, or is gone."""

STOPPED = 75
"""Exit code of what was asked to stop and goes on at the next start: EX_TEMPFAIL of sysexits.h."""

LAUNCHED = "MINITRON_LAUNCHED"
"""Set by our launcher, which shows errors itself, to its process id."""

PATIENCE_SECONDS = 5.0
"""How long a process that is no cause itself leaves the first word to the others; the launcher ends it as soon as it knows."""

LOOK_SECONDS = 2
"""Longest time between a death and the launcher's look, on a busy machine."""

LEAVING_SECONDS = 10.0
"""After which a process that has told its error is ended where it stands: closing its connections may wait for processes that are gone."""

_LOST = ("connection closed by peer", "connection reset", "broken pipe", "connection was closed", "failed to recv", "remote process exited")
_TIMEOUT = ("timed out", "timeout")


def tell(error: BaseException) -> None:
    """Leaves the error where the launcher finds it; without our launcher each process shows its own."""
    kind, launched = kind_of(error), "TORCHELASTIC_ERROR_FILE" in os.environ
    if launched and kind == "lost":
        time.sleep(PATIENCE_SECONDS)
    if launched:
        _record(error, kind)
    if os.environ.get(LAUNCHED) is None:
        print(error if kind == "mistake" else traceback.format_exc(), file=sys.stderr, flush=True)
    if launched and (kind == "timeout" or (kind == "mistake" and os.environ.get("RANK") != "0")):
        # the others that waited tell so too, and rank 0 puts away what it has begun, before the first to leave ends all
        time.sleep(PATIENCE_SECONDS)
    if launched:
        _leave_in_time(2 if kind == "mistake" else 1)


def kind_of(error: BaseException) -> Kind:
    """By gloo's and NCCL's words: they raise plain RuntimeErrors."""
    if isinstance(error, MinitronError):
        return "mistake"
    text = str(error).lower() if isinstance(error, RuntimeError | OSError) else ""
    if any(words in text for words in _LOST):
        return "lost"
    return "timeout" if any(words in text for words in _TIMEOUT) else "defect"


def message_of(failures: Mapping[int, ProcessFailure], stage: str) -> str:
    """One line for a user's mistake or a killed process; else the first failing rank and its traceback.

    failures: by rank, in the order in which the launcher saw them; those that it ended itself are among them.
    """
    rank = first_cause(failures)
    failure, recorded = failures[rank], _recorded(failures[rank])
    if recorded is None:
        return f"{stage}: rank {rank} {_death(failure)}"
    if recorded["kind"] == "mistake":
        return recorded["message"].split(": ", 1)[1]
    heading = f"{stage}: rank {rank} failed"
    if recorded["kind"] == "lost":
        heading += " because another process was gone; where that one ran, its launcher says why"
    if recorded["kind"] == "timeout":
        silent = [str(other) for other in sorted(failures) if _recorded(failures[other]) is None]
        heading += " after it had waited for others too long (parallel.timeout_seconds)" + (
            f"; the ranks that told nothing, which may have hung: {', '.join(silent)}" if silent else ""
        )
    return f"{heading}: {recorded['message']}\n{recorded['extraInfo']['py_callstack']}"


def exit_code_of(failures: Mapping[int, ProcessFailure], *, asked: bool = False) -> int:
    """2 for a user's mistake, STOPPED where processes left because they were asked to, else 1.

    asked: the launcher was asked to end: processes that are gone, and those that miss them, are what was wanted.
    """
    failure = failures[first_cause(failures)]
    recorded = _recorded(failure)
    if recorded is None:
        wanted = failure.exitcode in (STOPPED, -signal.SIGTERM, -signal.SIGUSR1)
        return STOPPED if wanted else 1
    if recorded["kind"] == "mistake":
        return 2
    return STOPPED if asked and recorded["kind"] == "lost" else 1


def is_consequence(failures: Mapping[int, ProcessFailure]) -> bool:
    """Whether what failed first only missed a process of another node."""
    recorded = _recorded(failures[first_cause(failures)])
    return recorded is not None and recorded["kind"] in ("lost", "timeout")


def first_cause(failures: Mapping[int, ProcessFailure]) -> int:
    """The rank that failed first; of the same second, one that died or failed by itself before those that followed it."""
    return min(failures, key=lambda rank: (_seconds(failures[rank]), _place(failures[rank])))


def _seconds(failure: ProcessFailure) -> float:
    """When it failed: a process that left no word was only found dead then, at the launcher's next look."""
    return failure.timestamp - (LOOK_SECONDS if _place(failure) == 0 else 0)


def _place(failure: ProcessFailure) -> int:
    recorded = _recorded(failure)
    if recorded is not None:
        return {"mistake": 1, "defect": 1, "timeout": 3, "lost": 3}[recorded["kind"]]
    # NCCL aborts a process whose peer is gone, and the launcher ends those that are left with SIGTERM
    return {-signal.SIGABRT: 2, -signal.SIGTERM: 4}.get(failure.exitcode, 0)


def _death(failure: ProcessFailure) -> str:
    if failure.exitcode >= 0:
        return f"left with exit code {failure.exitcode} and no word"
    reason = {
        "SIGKILL": ", probably out of memory (the kernel's log says so: dmesg); a smaller micro_batch or more processes need less",
        "SIGBUS": ", probably because /dev/shm or a disk is full",
    }.get(failure.signal_name(), "")
    return f"was killed by signal {-failure.exitcode} ({failure.signal_name()}){reason}"


def _record(error: BaseException, kind: Kind) -> None:
    """In the form of torchelastic's error files, with the kind beside; whole or not at all, for the launcher may end this process meanwhile."""
    extra = {"py_callstack": "".join(traceback.format_exception(error)), "timestamp": str(int(time.time()))}
    told = {"message": f"{type(error).__name__}: {error}", "kind": kind, "extraInfo": extra}
    write_json(Path(os.environ["TORCHELASTIC_ERROR_FILE"]), {"message": told})


def _recorded(failure: ProcessFailure) -> dict[str, Any] | None:
    path = Path(failure.error_file)
    return json.loads(path.read_text())["message"] if path.is_file() else None


def _leave_in_time(code: int) -> None:
    timer = threading.Timer(LEAVING_SECONDS, os._exit, [code])
    timer.daemon = True
    timer.start()
