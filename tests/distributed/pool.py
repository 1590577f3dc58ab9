"""A pool of worker processes that lives as long as the pytest session: tests share what importing torch and megatron costs.

The workers are forked from one server that has imported everything, so a pool that was killed is back in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist

from minitron_megatron.parallel.layout import destroy_layout
from minitron_megatron.parallel.world import World
from minitron_megatron.platform import activate

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}
"""One thread each, on purpose: the number of threads changes the order of additions."""


RENEW_AFTER_CALLS = 60
"""Every gloo group that megatron's caches keep alive keeps its threads: some calls on, a worker has hundreds. A new one is a fork."""


class WorkerError(Exception):
    """A worker's traceback, or the stacks of those that did not answer in time."""


class Pool:
    """`run(function, *args, processes=N)`: the function's results in N processes that meet in a fresh process group."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._calls = 0
        self._workers: list[_Worker] = []
        # one server for all calls: a file as a store is polled by every process for every group that is made
        self._store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        os.environ.update(ENVIRONMENT)
        # the server is started with this environment and imports the workers' modules by name
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *sys.path]))
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([f"{__package__}.preload"])

    def run(self, function: Callable[..., Any], *args: Any, processes: int, timeout_seconds: float = 90) -> list[Any]:
        """[function(world, *args) in rank 0, rank 1, …]; raises WorkerError as soon as one raises, and replaces all workers then."""
        self._calls += 1
        if self._calls % RENEW_AFTER_CALLS == 0:
            self.close()
        while len(self._workers) < processes:
            self._workers.append(_Worker(self._context, self._folder / f"worker-{len(self._workers)}.log"))
        meeting = self._store.port, f"call-{self._calls}"
        for rank, worker in enumerate(self._workers[:processes]):
            worker.connection.send_bytes(pickle.dumps((function, args, rank, processes, meeting, timeout_seconds)))
        try:
            return self._collect(self._workers[:processes], time.monotonic() + timeout_seconds)
        except WorkerError:
            self.close()
            raise

    def close(self) -> None:
        """Kills every worker with all processes that it started."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _collect(self, workers: list[_Worker], deadline: float) -> list[Any]:
        rank_of = {worker.connection: rank for rank, worker in enumerate(workers)}
        results: dict[int, Any] = {}
        while len(results) < len(workers):
            waiting = [connection for connection, rank in rank_of.items() if rank not in results]
            ready = wait(waiting, timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                silent = [workers[rank_of[connection]].stack() for connection in waiting]
                raise WorkerError(f"no answer in time from ranks {[rank_of[item] for item in waiting]}\n" + "\n".join(silent))
            for connection in ready:
                rank = rank_of[connection]  # type: ignore[index]
                results[rank] = workers[rank].answer(rank)
        return [results[rank] for rank in range(len(workers))]


class _Worker:
    def __init__(self, context: Any, log: Path) -> None:
        self.log = log
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, str(log)))
        self.process.start()
        theirs.close()

    def answer(self, rank: int) -> Any:
        try:
            ok, value = pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            raise WorkerError(f"rank {rank} died\n{self.log.read_text()[-2000:]}") from None
        if not ok:
            raise WorkerError(f"rank {rank} raised\n{value}")
        return value

    def stack(self) -> str:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(0.3)
        return f"--- {self.log.name}\n{self.log.read_text()[-4000:]}"

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join(10)
        self.connection.close()


def serve(connection: Connection, log: str) -> None:
    """A worker's life: calls come in, results or tracebacks go out, until the other end is closed."""
    os.setsid()
    with Path(log).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    while True:
        try:
            function, args, rank, size, meeting, timeout_seconds = pickle.loads(connection.recv_bytes())
        except EOFError:
            os.killpg(0, signal.SIGKILL)
        try:
            answer = (True, _call(function, args, rank, size, meeting, timeout_seconds))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))
        if not answer[0]:
            time.sleep(60)  # still holds its sockets: the others must not fail first and hide the cause; the pool kills all


def _call(function: Callable[..., Any], args: Any, rank: int, size: int, meeting: tuple[int, str], timeout_seconds: float) -> Any:
    port, call = meeting
    store = dist.PrefixStore(call, dist.TCPStore("localhost", port, is_master=False, wait_for_workers=False))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_seconds))
    result = function(World(activate("cpu"), rank, size), *args)
    dist.barrier()  # a rank that is done must not take its connections away from the others
    destroy_layout()
    dist.destroy_process_group()
    gc.collect()  # models and optimizers are cycles that hold groups, and a group of gloo keeps a thread
    return result
