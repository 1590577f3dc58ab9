"""Peak memory and speed of pruning a checkpoint as a stream, in one and two processes, beside loading all of it and indexing.

Claim: the stream's memory is a few of the largest tensors whatever the model's size. Synthetic models with the same largest tensor and more
layers; each figure from fresh processes: the peak of resident memory over what it was before the checkpoint was opened.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import write_result

LAYERS = {0.25: 4, 0.5: 8, 1.0: 17, 2.0: 35}
"""GB of weights (bf16) → layers."""
WAYS = ("stream, 1 process", "stream, 2 processes", "load all, 1 process")
LARGEST_MB = 16_384 * 1024 * 2 / 1e6


def main() -> None:
    if len(sys.argv) > 1:
        return measure(*sys.argv[1:])
    rows, figures = [], {}
    for gigabytes, layers in LAYERS.items():
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            run("write", layers, Path(folder), 1)
            found = {way: run("load" if "load" in way else "stream", layers, Path(folder), 2 if "2 processes" in way else 1) for way in WAYS}
        figures[str(gigabytes)] = found
        rows.append(
            f"| {gigabytes} GB, {layers} layers | " + " | ".join(f"{x['peak_mb']:.0f} MB, {x['gb_per_s']:.2f} GB/s" for x in found.values()) + " |"
        )
        digests = {x["digest"] for way, x in found.items() if way.startswith("stream")}
        assert len(digests) == 1, "one and two processes wrote other weights"
    write_result("prune_memory", "Memory of pruning", text(rows), figures)


def text(rows: list[str]) -> str:
    return "\n".join(
        [
            f"Peak resident memory over the start (the largest process), and source bytes a second; the largest tensor is {LARGEST_MB:.0f} MB.",
            "bf16, every layer kept, hidden 1024 → 768, FFN 8192 → 6144, heads 16 → 12; source in the page cache; files are synced.",
            "`load all`: megatron's `dist_checkpointing.load_plain_tensors`, the same cuts, `torch.distributed.checkpoint.save`.",
            "",
            "| source | " + " | ".join(WAYS) + " |",
            "|---|--:|--:|--:|",
            *rows,
        ]
    )


def run(what: str, layers: int, folder: Path, processes: int) -> dict[str, Any]:
    """Fresh processes, in the environment that the launcher gives to workers."""
    from minitron_megatron.launcher import worker_environment

    shutil.rmtree(folder / "target", ignore_errors=True)
    (folder / "store").unlink(missing_ok=True)
    environment = {**os.environ, **worker_environment(processes, streams=True)}
    command = [sys.executable, __file__, what, str(layers), str(folder)]
    started = [subprocess.Popen([*command, str(rank), str(processes)], env=environment, stdout=subprocess.PIPE) for rank in range(processes)]
    told = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"{what} of {layers} layers failed")
    found = [json.loads(line.splitlines()[-1]) for line in told]
    seconds = max(x["seconds"] for x in found)
    return {"peak_mb": max(x["peak_mb"] for x in found), "gb_per_s": found[0]["bytes"] / seconds / 1e9, "digest": found[0]["digest"]}


def measure(what: str, layers: str, place: str, rank: str, processes: str) -> None:
    """One process of one run: prints its figures."""
    from minitron_megatron.platform import activate

    activate("cpu")
    import torch.distributed as dist

    folder, arch = Path(place), architecture(int(layers))
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=int(rank), world_size=int(processes))
    work = {"write": write, "stream": stream, "load": load_all}[what]
    prepare(what)
    dist.barrier()
    before, started = reset_peak(), time.monotonic()
    digest = work(folder, arch)
    seconds = time.monotonic() - started
    figures = {"peak_mb": (resident("VmHWM") - before) / 1e6, "seconds": seconds, "digest": digest, "bytes": source_bytes(folder)}
    print(json.dumps(figures), flush=True)
    dist.destroy_process_group()
    os._exit(0)  # torch's or gloo's native end aborts now and then when the work is done; worker.py leaves like this as well


def prepare(what: str) -> None:
    """Imports that are no part of what is measured."""
    if what == "load":
        from megatron.core import dist_checkpointing  # noqa: F401
    from minitron_megatron.prune import stage  # noqa: F401


def architecture(layers: int) -> Any:
    from minitron_megatron.arch.architecture import Architecture

    return Architecture("llama", layers, 1024, 16, 4, 64, 8192, 16_384, True, 4096, 1e-5, 10_000.0)


def plan_for(arch: Any) -> Any:
    from minitron_megatron.prune.plan import make_plan
    from minitron_megatron.scores.units import random_scores

    return make_plan(random_scores(arch, 0), arch, arch.resized(hidden=768, ffn=6144, heads=12))


def write(folder: Path, arch: Any) -> str:
    import torch

    from minitron_megatron.checkpoint.tensors import tensor_table
    from minitron_megatron.checkpoint.torch_dist import write_torch_dist

    def draw(row: Any, rows: range | None = None) -> torch.Tensor:
        length, *others = row.shape(arch)
        return torch.randn(length if rows is None else len(rows), *others, dtype=torch.bfloat16)

    return write_torch_dist(folder / "source", tensor_table(arch), arch, dtype=lambda row: torch.bfloat16, read=draw)


def stream(folder: Path, arch: Any) -> str:
    import torch.distributed as dist

    from minitron_megatron.checkpoint.torch_dist import MegatronSource
    from minitron_megatron.prune.stream import apply_plan

    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    return apply_plan(MegatronSource(folder / "source", arch), plan_for(arch), folder / "target", group)


def load_all(folder: Path, arch: Any) -> str:
    import torch.distributed.checkpoint as dcp
    from megatron.core import dist_checkpointing

    from minitron_megatron.prune.slice import slice_tensor
    from minitron_megatron.prune.stream import source_rows

    plan = plan_for(arch)
    tensors = dist_checkpointing.load_plain_tensors(str(folder / "source"))
    cut = {name: slice_tensor(row, tensors[row.name], plan) for name, row in source_rows(plan).items()}
    dcp.save(cut, storage_writer=dcp.FileSystemWriter(folder / "target"))
    return "not computed"


def source_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "source").glob("*.distcp"))


def reset_peak() -> int:
    """Makes the kernel forget the peak so far; bytes that are resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
