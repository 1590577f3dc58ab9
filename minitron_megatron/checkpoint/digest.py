"""The digest of a checkpoint's weights: of its tensors' digests, so that several processes can each take a part of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def tensor_digest(name: str, tensor: Tensor) -> bytes:
    """sha256 of a tensor's name, type, shape and bytes; the tensor lies on the CPU."""
    digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def combined_digest(digests: Iterable[bytes]) -> str:
    """sha256 over the digests of all tensors, in the order of the table of tensors."""
    return hashlib.sha256(b"".join(digests)).hexdigest()
