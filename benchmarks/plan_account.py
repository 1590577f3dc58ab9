"""Accounts of memory for plan_memory.py: storages that live, those that an operation makes, and those that autograd keeps."""

from __future__ import annotations

import gc
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def living() -> dict[int, int]:
    """Address → bytes of every storage that some tensor has."""
    found: dict[int, int] = {}
    for item in gc.get_objects():
        if issubclass(type(item), Tensor) and item.device.type == "cpu":
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def living_bytes() -> int:
    return sum(living().values())


class Account(TorchDispatchMode):
    """`peak`: the most bytes that storages made under it held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **(kwargs or {}))
        self._living = {address: entry for address, entry in self._living.items() if not entry[0].expired()}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _address(leaf) not in given:
                storage = leaf.untyped_storage()
                self._living[_address(leaf)] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._living.values()))
        return result


class KeptBytes:
    """`found`: for every forward pass of a chunk, the bytes of new storages that autograd kept, with its result where that is not the loss's."""

    def __init__(self, chunks: list[torch.nn.Module]) -> None:
        self.found: list[int] = []
        self._chunks, self._handles = chunks, []
        self._hooks: Any = None
        self._before: dict[int, int] = {}
        self._kept: dict[int, Tensor] = {}

    def __enter__(self) -> KeptBytes:
        for chunk in self._chunks:
            self._handles += [chunk.register_forward_pre_hook(self._begin), chunk.register_forward_hook(self._end)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: Any, inputs: Any) -> None:
        if self.found:  # one of each chunk is enough: all micro-batches are alike
            return
        self._before = living()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)
        self._hooks.__enter__()

    def _pack(self, x: Tensor) -> Tensor:
        if _address(x) not in self._before:
            self._kept[_address(x)] = x
        return x

    def _end(self, module: Any, inputs: Any, output: Tensor) -> None:
        if self._hooks is None:
            return
        self._hooks.__exit__(None, None, None)
        if not module.post_process:
            self._kept[_address(output)] = output
        self.found.append(sum(x.untyped_storage().nbytes() for x in self._kept.values()))
        self._kept, self._hooks = {}, None


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
