"""What megatron.core sees in place of `torch.cuda` when it is loaded for CPU processes.

The device is "cpu", streams and events have nothing to wait for, and the random state is torch's CPU generator. Names
that are not here come from the real `torch.cuda`, so that an unforeseen use fails with torch's own message.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

_real = torch.cuda


def current_device() -> str:
    """A device that every `device=` argument takes."""
    return "cpu"


def set_device(device: Any) -> None:
    """There is one."""


def is_available() -> bool:
    """False even where the machine has a GPU: this process was asked to run on the CPU."""
    return False


def is_initialized() -> bool:
    """Nothing to initialise."""
    return False


def device_count() -> int:
    """No GPU, for the same reason."""
    return 0


def get_device_capability(device: Any = None) -> tuple[int, int]:
    """Below every architecture that megatron asks for."""
    return (0, 0)


def get_device_properties(device: Any = None) -> SimpleNamespace:
    """The two numbers that megatron reads."""
    return SimpleNamespace(major=0, minor=0, multi_processor_count=1, name="cpu")


def synchronize(device: Any = None) -> None:
    """CPU operators are done when they return."""


def empty_cache() -> None:
    """The CPU allocator keeps no cache of its own."""


def memory_allocated(device: Any = None) -> int:
    """Device memory in bytes: none."""
    return 0


def memory_stats(device: Any = None) -> dict[str, int]:
    """No device allocator, no figures."""
    return {}


def is_current_stream_capturing() -> bool:
    """CUDA graphs do not exist here."""
    return False


def get_rng_state(device: Any = None) -> torch.Tensor:
    """The CPU generator's state."""
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    """Restore the CPU generator's state."""
    torch.set_rng_state(state)


def manual_seed(seed: int) -> None:
    """Seed the CPU generator."""
    torch.manual_seed(seed)


manual_seed_all = manual_seed


def _lazy_init() -> None:
    """Nothing to initialise."""


def _lazy_call(callback: Callable[[], Any], **kwargs: Any) -> None:
    """torch.cuda queues this until CUDA is up; the CPU is up."""
    callback()


class device(contextlib.nullcontext[None]):
    """`with torch.cuda.device(...)`: there is one device."""


class _AnyIndex:
    """default_generators[i] is the CPU generator for every i."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator


default_generators = _AnyIndex()


class random:
    """torch.cuda.random."""

    get_rng_state = staticmethod(get_rng_state)
    set_rng_state = staticmethod(set_rng_state)


class Event:
    """Recorded and reached at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 0.0


class Stream:
    """Work that is put on it has run already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()


_only_stream = Stream()  # one object: megatron compares streams by identity


def current_stream(device: Any = None) -> Stream:
    """The only one."""
    return _only_stream


default_stream = current_stream


def set_stream(stream: Any) -> None:
    """There is one."""


def stream(stream: Any) -> contextlib.nullcontext[None]:
    """`with torch.cuda.stream(s)`: there is one."""
    return contextlib.nullcontext()


class nvtx:
    """torch.cuda.nvtx: no profiler listens."""

    @staticmethod
    def range_push(message: str) -> None: ...
    @staticmethod
    def range_pop() -> None: ...
    @staticmethod
    def mark(message: str) -> None: ...

    @staticmethod
    def range(message: str, *args: Any, **kwargs: Any) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()


def __getattr__(name: str) -> Any:
    return getattr(_real, name)
