"""Forked processes, what they fork themselves, and what a worker spawns do not outlive the process that started them."""

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

SPAWNING = """
import importlib.util, multiprocessing, sys, time
sys.modules["__main__"].__spec__ = importlib.util.find_spec("minitron_megatron.worker")
manager = multiprocessing.get_context("spawn").Manager()
print(manager._process.pid, flush=True)
time.sleep(60)
"""
"""As megatron's first checkpoint does in a worker."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the signal of a parent's death is Linux's")


def test_children_and_grandchildren_end_with_a_killed_parent() -> None:
    _kill_parent(PROGRAM, children=2)


def test_what_megatron_spawns_in_a_worker_ends_with_it() -> None:
    _kill_parent(SPAWNING, children=1)


def _kill_parent(program: str, *, children: int) -> None:
    """Its children, whose ids it prints, must be gone soon after."""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    family = [psutil.Process(int(parent.stdout.readline())) for _ in range(children)]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family if psutil.pid_exists(process.pid)):
        assert time.monotonic() < deadline, "an orphan goes on"
        time.sleep(0.05)
