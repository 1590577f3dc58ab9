"""What a piece of a program does with tensors: values that the host reads of them, and the memory that they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")
"""Methods of a tensor that wait for the device that computes it."""
OPERATIONS = ("_local_scalar_dense", "nonzero", "unique", "_unique2", "unique_dim", "masked_select", "equal", "is_nonzero")
"""ATen's that do, whoever calls them: a value, or a shape that depends on values."""


class _Reads(TorchFunctionMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in READS:
            self._seen.append(function.__name__)
        return function(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(getattr(function, "overloadpacket", function), "__name__", "")
        by_mask = name == "index" and any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])
        if name in OPERATIONS or by_mask:
            self._seen.append(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def host_reads() -> Iterator[list[str]]:
    """The names of all that would wait for a device, as this thread does it while the context is open."""
    seen: list[str] = []
    with _Reads(seen), _Operations(seen):
        yield seen


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made by this thread under it held at one time: `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {address_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **(kwargs or {}))
        self._living = {address: entry for address, entry in self._living.items() if not entry[0].expired()}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and address_of(leaf) not in given:
                storage = leaf.untyped_storage()
                self._living[address_of(leaf)] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._living.values()))
        return result


def address_of(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
