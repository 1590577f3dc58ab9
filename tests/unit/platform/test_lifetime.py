"""A forked process, and what it forks itself, do not outlive the process that started them."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

PROGRAM = """
import multiprocessing, os, time
from minitron_megatron.platform.lifetime import run_ending_with_parent
def inner(): print(os.getpid(), flush=True); time.sleep(60)
def outer():
    print(os.getpid(), flush=True)
    child = multiprocessing.get_context("fork").Process(target=inner)
    child.start(); child.join()
child = multiprocessing.get_context("fork").Process(target=run_ending_with_parent, args=(outer,))
child.start(); child.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the signal of a parent's death is Linux's")
def test_children_and_grandchildren_end_with_a_killed_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    family = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family if psutil.pid_exists(process.pid)):
        assert time.monotonic() < deadline, "an orphan goes on"
        time.sleep(0.05)
