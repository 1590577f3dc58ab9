"""Streams in slabs: the bits and the digest of whole tensors, every byte read once, and threads that end with their stream."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.arch.source import source_architecture
from minitron_megatron.checkpoint import file_bytes, slabs
from minitron_megatron.checkpoint.huggingface import HuggingFaceSource, write_huggingface
from minitron_megatron.checkpoint.read_ahead import read_ahead
from minitron_megatron.checkpoint.slabs import Slab, slabs_of
from minitron_megatron.checkpoint.tensors import TensorRow, tensor_table
from minitron_megatron.checkpoint.torch_dist import MegatronSource, TorchDistReader, weights_digest, write_torch_dist
from minitron_megatron.errors import ArtifactError, CheckpointError

SLAB_BYTES = 1000
"""Six rows of 40 fp32 channels: 131 vocabulary rows and 56 rows of gate and up are no multiples, and one slab holds both of the latter."""

Import = Callable[[Path, Path], Architecture]


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "SLAB_BYTES", SLAB_BYTES)


def read_by_torch(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by torch's own loader."""
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    found = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
    dcp.load(found, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return found


def of_row(row: TensorRow, tensors: dict[str, Tensor]) -> Tensor:
    return tensors[row.key] if row.expert is None else tensors[row.key][row.expert]


def digest_of(tensors: dict[str, Tensor], arch: Architecture) -> str:
    """The digest as it has been since the first version, of whole tensors."""
    whole = hashlib.sha256()
    for row in tensor_table(arch):
        tensor = of_row(row, tensors)
        header = f"{row.name} {tensor.dtype} {list(tensor.shape)}".encode()
        whole.update(hashlib.sha256(header + tensor.contiguous().numpy().tobytes()).digest())
    return whole.hexdigest()


def test_slabs_hold_every_row_once_and_no_more_than_they_may(tiny_hf_model: Callable[..., Path]) -> None:
    arch = source_architecture(str(tiny_hf_model("llama")))
    rows = defaultdict(list)
    for slab in slabs_of(tensor_table(arch), arch, lambda row: torch.float32, SLAB_BYTES):
        rows[slab.row.name] += slab.rows
        assert slab.nbytes <= SLAB_BYTES or slab.row.axes[0] == "QKV" or len(slab.rows) == 1
        assert slab.is_whole or slab.row.axes[0] != "QKV"
    assert rows == {row.name: list(range(row.shape(arch)[0])) for row in tensor_table(arch)}


@pytest.mark.usefixtures("small_slabs")
def test_an_import_in_slabs_has_the_bits_and_the_digest_of_whole_tensors(
    every_family: Path, tmp_path: Path, import_model: Import, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = import_model(every_family, tmp_path / "slabs")
    assert len(TorchDistReader(tmp_path / "slabs").tensors["embedding.word_embeddings.weight"].chunks) == 22
    digest = weights_digest(MegatronSource(tmp_path / "slabs", arch))
    monkeypatch.setattr(slabs, "SLAB_BYTES", 1 << 30)
    import_model(every_family, tmp_path / "whole")
    found, expected = read_by_torch(tmp_path / "slabs"), read_by_torch(tmp_path / "whole")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert digest == digest_of(expected, arch) == weights_digest(MegatronSource(tmp_path / "whole", arch))
    for row in tensor_table(arch):  # across the borders of chunks
        middle = range(1, row.shape(arch)[0] - 1)
        assert torch.equal(MegatronSource(tmp_path / "slabs", arch).read(row, middle), of_row(row, expected)[middle.start : middle.stop])


@pytest.mark.usefixtures("small_slabs")
def test_megatron_loads_an_import_in_slabs(tiny_hf_model: Callable[..., Path], tmp_path: Path, import_model: Import, load_imported: Any) -> None:
    source = tiny_hf_model("llama")
    arch = import_model(source, tmp_path / "slabs")
    model, expected = load_imported(tmp_path / "slabs", arch), load_file(source / "model.safetensors")
    (chunk,) = model.chunks
    assert torch.equal(chunk.embedding.word_embeddings.weight[: arch.vocab], expected["model.embed_tokens.weight"])
    gate_up = torch.cat([expected[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up")])
    assert torch.equal(chunk.decoder.layers[1].mlp.linear_fc1.weight, gate_up)


@pytest.mark.parametrize("mixed", [False, True])
def test_an_export_in_slabs_is_the_file_that_safetensors_writes(
    every_family: Path, tmp_path: Path, import_model: Import, monkeypatch: pytest.MonkeyPatch, mixed: bool
) -> None:
    """To the byte, with wide types ahead of narrow ones."""
    source, back = tmp_path / "source", tmp_path / "back"
    source.mkdir()
    back.mkdir()
    tensors = load_file(every_family / "model.safetensors")
    tensors = {name: tensor if "norm" in name or not mixed else tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_bytes((every_family / "config.json").read_bytes())
    arch = import_model(source, tmp_path / "checkpoint")
    monkeypatch.setattr(slabs, "SLAB_BYTES", SLAB_BYTES)
    write_huggingface(back, MegatronSource(tmp_path / "checkpoint", arch), arch)
    assert (back / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[int, int]]]:
    """File → (first byte, byte behind the last) of each read of a tensor's bytes."""
    seen: dict[str, list[tuple[int, int]]] = defaultdict(list)
    real = os.preadv

    def preadv(file: int, buffers: Any, offset: int) -> int:
        count = real(file, buffers, offset)
        seen[os.readlink(f"/proc/self/fd/{file}")].append((offset, offset + count))
        return count

    monkeypatch.setattr(file_bytes.os, "preadv", preadv)
    return seen


@pytest.mark.usefixtures("small_slabs")
def test_import_and_export_read_every_byte_once(
    tiny_hf_model: Callable[..., Path], tmp_path: Path, import_model: Import, reads: dict[str, list[tuple[int, int]]]
) -> None:
    arch = import_model(tiny_hf_model("llama"), tmp_path / "checkpoint")
    write_huggingface(tmp_path, MegatronSource(tmp_path / "checkpoint", arch), arch)
    total = sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    assert len(reads) == 2
    for spans in reads.values():
        ordered = sorted(spans)
        assert all(before[1] <= after[0] for before, after in pairwise(ordered))
        assert sum(stop - start for start, stop in spans) == total


def test_a_tensor_that_torch_saved_in_another_order_is_read_by_torch(tmp_path: Path, reads: dict[str, list[tuple[int, int]]]) -> None:
    """Its columns lie behind one another; and bytes of a type that is no weight's are none of ours."""
    tensors = {"turned": torch.arange(12.0).view(3, 4).t(), "whole": torch.arange(12.0).view(3, 4), "numbers": torch.arange(5)}
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    reader = TorchDistReader(tmp_path)
    assert torch.equal(reader.read("turned", (1, 0), (2, 3)), tensors["turned"][1:3])
    assert torch.equal(reader.read("numbers", (1,), (2,)), tensors["numbers"][1:3])
    assert not reads
    assert torch.equal(reader.read("whole", (1, 0), (1, 4)), tensors["whole"][1:2])
    assert torch.equal(reader.read("whole", (0, 1), (3, 2)), tensors["whole"][:, 1:3])  # scattered: torch's reader again
    assert [stop - start for spans in reads.values() for start, stop in spans] == [16]


def slabs_of_one_kib(count: int) -> list[Slab]:
    row = TensorRow("x", (), ("V", "D"))
    return [Slab(row, (count, 256), torch.float32, range(place, place + 1)) for place in range(count)]


def threads_of_ours() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith(("read-ahead", "digest"))}


def test_the_reader_runs_ahead_by_its_bytes_and_no_further() -> None:
    begun: list[int] = []

    def read(slab: Slab) -> Tensor:
        begun.append(slab.rows.start)
        return torch.full((1, 256), float(slab.rows.start))

    seen = []
    with closing(read_ahead(slabs_of_one_kib(20), read, 3 << 10)) as stream:
        for slab, tensor in stream:
            time.sleep(0.01)  # the reader has every chance to run away
            assert tensor[0, 0] == slab.rows.start
            assert max(begun) <= slab.rows.start + 3
            seen.append(max(begun) - slab.rows.start)
    assert begun == list(range(20)) and max(seen) == 3  # it does run ahead
    assert not threads_of_ours()


def test_closing_a_stream_whose_reader_waits_ends_it_after_that_read() -> None:
    gate, waits, begun = threading.Event(), threading.Event(), []

    def read(slab: Slab) -> Tensor:
        begun.append(slab.rows.start)
        if slab.rows.start == 1:
            waits.set()
            gate.wait(10)
        return torch.zeros(1, 256)

    stream = read_ahead(slabs_of_one_kib(20), read, 4 << 10)
    next(stream)
    assert waits.wait(10)
    threading.Timer(0.1, gate.set).start()
    stream.close()
    assert begun == [0, 1] and not threads_of_ours()


@pytest.fixture
def imported(tiny_hf_model: Callable[..., Path], tmp_path: Path) -> Callable[..., str]:
    """imported(read=…, on_bytes=…): an import into tmp_path/checkpoint with these in place of its own."""
    folder = tiny_hf_model("llama")
    arch = source_architecture(str(folder))
    source = HuggingFaceSource(folder, arch)

    def write(**others: Any) -> str:
        own: dict[str, Any] = {"dtype": source.dtype, "read": source.read}
        return write_torch_dist(tmp_path / "checkpoint", tensor_table(arch), arch, **{**own, **others})

    return write


def broken_after(count: int, error: BaseException) -> Callable[[int], None]:
    """Raises at the end of the first write that makes count bytes of all."""
    written = 0

    def on_bytes(more: int) -> None:
        nonlocal written
        written += more
        if written >= count:
            raise error

    return on_bytes


@pytest.mark.usefixtures("small_slabs")
def test_what_the_reader_meets_is_raised_as_it_is_and_leaves_no_checkpoint(imported: Callable[..., str], tmp_path: Path) -> None:
    def read(row: TensorRow, rows: range | None = None) -> Tensor:
        if rows is not None and rows.start < 12:
            return torch.zeros(len(rows), 40)
        raise CheckpointError("the file is cut short; copy the model anew")

    with pytest.raises(CheckpointError, match=r"^the file is cut short; copy the model anew$"):
        imported(read=read)
    assert not (tmp_path / "checkpoint" / ".metadata").exists() and not threads_of_ours()


@pytest.mark.usefixtures("small_slabs")
def test_an_interrupt_ends_the_threads_and_leaves_no_checkpoint(imported: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        imported(on_bytes=broken_after(20_000, KeyboardInterrupt()))
    assert not (tmp_path / "checkpoint" / ".metadata").exists() and not threads_of_ours()


def test_the_bytes_told_are_those_of_the_file(imported: Callable[..., str], tmp_path: Path) -> None:
    told: list[int] = []
    imported(on_bytes=told.append)
    (file,) = (tmp_path / "checkpoint").glob("*.distcp")
    assert sum(told) == file.stat().st_size


def test_an_export_onto_a_full_disk_is_one_line(tiny_hf_model: Callable[..., Path], tmp_path: Path) -> None:
    arch = source_architecture(str(tiny_hf_model("llama")))
    (tmp_path / "model.safetensors").symlink_to("/dev/full")
    with pytest.raises(ArtifactError, match=r"model\.safetensors: cannot be written \(No space left on device\); free some space"):
        write_huggingface(tmp_path, HuggingFaceSource(tiny_hf_model("llama"), arch), arch)
    assert not threads_of_ours()
