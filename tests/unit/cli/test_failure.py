"""Of several processes that failed, the one that is shown: files and exit codes as torchelastic hands them over."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from traceback import StackSummary

import pytest
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from minitron_megatron import failure, worker
from minitron_megatron.errors import CheckpointError
from minitron_megatron.failure import exit_code_of, kind_of, message_of

GLOO_LOST = "[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711"
GLOO_TIMEOUT = "[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete"
NCCL_LOST = "NCCL error: remote process exited or there was a network error, NCCL version 2.27"

Failed = Callable[..., ProcessFailure]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Failed:
    """failed(exit code, error that the process told or None, second of its end)."""
    monkeypatch.setattr(failure, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(failure, "LEAVING_SECONDS", 1e6)
    monkeypatch.setenv(failure.LAUNCHED, "1")

    def make(code: int, error: Exception | None = None, at: int = 100) -> ProcessFailure:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        if error is not None:
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
            monkeypatch.setattr(failure.time, "time", lambda: at)
            failure.tell(error)
        made = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file=str(path))
        made.timestamp = at
        return made

    return make


def test_a_kill_comes_before_what_its_peers_saw_in_the_same_second(failed: Failed) -> None:
    failures = {0: failed(1, RuntimeError(GLOO_LOST)), 1: failed(-signal.SIGTERM), 3: failed(-signal.SIGKILL), 2: failed(1, RuntimeError(NCCL_LOST))}
    assert message_of(failures, "distill").startswith("distill: rank 3 was killed by signal 9 (SIGKILL), probably out of memory")
    assert exit_code_of(failures) == 1


def test_an_error_of_its_own_comes_before_lost_connections(failed: Failed) -> None:
    failures = {0: failed(1, RuntimeError(GLOO_LOST)), 1: failed(1, ValueError("not a number")), 2: failed(-signal.SIGTERM)}
    assert message_of(failures, "distill").startswith("distill: rank 1 failed: ValueError: not a number\n")


def test_a_process_that_the_launcher_had_to_kill_is_no_cause(failed: Failed) -> None:
    """Hung, so that it left neither a word nor at SIGTERM: killed 30 s after the others told of their wait."""
    failures = {0: failed(1, RuntimeError(GLOO_TIMEOUT)), 1: failed(1, RuntimeError(GLOO_TIMEOUT)), 2: failed(-signal.SIGKILL, at=130)}
    message = message_of(failures, "distill")
    assert message.startswith("distill: rank 0 failed after it had waited for others too long (parallel.timeout_seconds)")
    assert "which may have hung: 2" in message


def test_where_only_connections_were_lost_the_cause_is_elsewhere(failed: Failed) -> None:
    assert "where that one ran, its launcher says why" in message_of({4: failed(1, RuntimeError(GLOO_LOST)), 5: failed(-signal.SIGTERM)}, "distill")


def test_a_users_mistake_is_one_line_even_where_the_process_was_ended_before_it_left(failed: Failed) -> None:
    failures = {1: failed(-signal.SIGTERM, CheckpointError("x.distcp: make the checkpoint anew"))}
    assert message_of(failures, "prune") == "x.distcp: make the checkpoint anew"
    assert exit_code_of(failures) == 2


def test_a_process_that_left_without_a_word_is_named(failed: Failed) -> None:
    assert message_of({2: failed(3)}, "evaluate") == "evaluate: rank 2 left with exit code 3 and no word"
    assert "rank 1 was killed by signal 7 (SIGBUS), probably because /dev/shm" in message_of({1: failed(-signal.SIGBUS)}, "evaluate")


def test_a_checkpoint_that_failed_is_told_though_torch_makes_it_no_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "error.json"
    monkeypatch.setattr(failure, "LEAVING_SECONDS", 1e6)
    monkeypatch.setenv(failure.LAUNCHED, "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(told))

    def fail(*_: object) -> None:
        raise CheckpointException("write", {0: (OSError("gone"), StackSummary())})

    monkeypatch.setattr(worker, "_run", fail)
    assert worker.main(["prune", "recipe.yaml"]) == 1
    assert json.loads(told.read_text())["message"]["message"].startswith("CheckpointException: ")


def test_an_error_while_the_connections_close_behind_the_work_is_told_and_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code would say that the stage failed, and the launcher end the process that still publishes its artifact."""
    told = tmp_path / "error.json"
    monkeypatch.setenv(failure.LAUNCHED, "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(told))

    def close() -> None:
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(worker, "_run", lambda connections, *_: connections.callback(close))
    assert worker.main(["prune", "recipe.yaml"]) == 0
    assert capsys.readouterr().err == "prune: finished; its connections did not close well: Connection reset by peer\n"
    assert not told.exists()


def test_a_worker_leaves_with_its_own_code_though_a_library_would_abort_at_the_end() -> None:
    """A native exit handler that aborts stands for a thread that still runs; Python's handlers and what was printed are not lost."""
    program = (
        "import atexit, ctypes, sys; from minitron_megatron import worker; libc = ctypes.CDLL(None); "
        "libc.__cxa_atexit(ctypes.cast(libc.abort, ctypes.c_void_p), None, None); atexit.register(print, 'handled'); print('printed', end=' '); "
    )
    ended = [
        subprocess.run([sys.executable, "-c", program + how], capture_output=True, text=True, cwd=ROOT) for how in ("worker._leave(3)", "sys.exit(3)")
    ]
    assert [(done.returncode, done.stdout) for done in ended] == [(3, "printed handled\n"), (-signal.SIGABRT, "printed handled\n")]


def test_a_process_that_is_ended_while_it_tells_leaves_no_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchelastic would raise at it, and the launcher end with a traceback of its own."""
    told, write = tmp_path / "error.json", Path.write_text

    def ended(path: Path, text: str) -> int:
        write(path, text[: len(text) // 2])
        raise SystemExit

    monkeypatch.setenv(failure.LAUNCHED, "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(told))
    monkeypatch.setattr(Path, "write_text", ended)
    with pytest.raises(SystemExit):
        failure.tell(CheckpointError("gone"))
    assert not told.exists()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError(GLOO_LOST), "lost"),
        (RuntimeError(NCCL_LOST), "lost"),
        (BrokenPipeError(32, "Broken pipe"), "lost"),
        (RuntimeError(GLOO_TIMEOUT), "timeout"),
        (CheckpointError("timed out"), "mistake"),
        (ValueError("connection closed by peer"), "defect"),
        (RuntimeError("shapes do not fit"), "defect"),
    ],
)
def test_kinds_of_errors(error: Exception, kind: str) -> None:
    assert kind_of(error) == kind


def test_one_that_lost_a_peer_leaves_it_the_first_word(failed: Failed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It waits before it tells, so that even whole seconds of the clock show the order."""
    events: list[str] = []
    monkeypatch.setattr(failure.time, "sleep", lambda seconds: events.append("wait"))
    monkeypatch.setattr(failure, "_record", lambda *_: events.append("tell"))
    monkeypatch.setattr(failure, "_leave_in_time", lambda code: events.append("leave"))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    for error in (RuntimeError(GLOO_LOST), ValueError("own"), RuntimeError(GLOO_TIMEOUT)):
        failure.tell(error)
    assert events == ["wait", "tell", "leave", "tell", "leave", "tell", "wait", "leave"]


def test_the_error_file_is_one_that_torchelastic_reads(failed: Failed) -> None:
    told = failed(1, ValueError("own"), at=77)
    assert json.loads(Path(told.error_file).read_text())["message"]["extraInfo"]["timestamp"] == "77"
    assert ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=told.error_file).timestamp == 77


def test_processes_that_left_as_they_were_asked_to_are_no_failure(failed: Failed) -> None:
    assert exit_code_of({0: failed(failure.STOPPED), 1: failed(failure.STOPPED)}) == failure.STOPPED
    assert exit_code_of({0: failed(-signal.SIGTERM), 1: failed(-signal.SIGTERM)}) == failure.STOPPED
    assert exit_code_of({0: failed(-signal.SIGUSR1), 1: failed(1, RuntimeError(GLOO_LOST))}) == failure.STOPPED


def test_who_misses_a_process_that_was_to_stop_has_stopped_too_and_a_mistake_is_told_all_the_same(failed: Failed) -> None:
    failures = {0: failed(1, RuntimeError(GLOO_LOST)), 1: failed(-signal.SIGTERM)}
    assert exit_code_of(failures) == 1
    assert exit_code_of(failures, asked=True) == failure.STOPPED
    assert exit_code_of({0: failed(2, CheckpointError("no such file")), 1: failed(-signal.SIGTERM)}, asked=True) == 2
    assert exit_code_of({0: failed(1, ValueError("a defect")), 1: failed(-signal.SIGTERM)}, asked=True) == 1
