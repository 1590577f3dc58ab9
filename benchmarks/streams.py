"""Import, prune and export of Llama-3.1-8B's shape as streams: memory of all processes together, and speed beside `cp` on the same disk.

Claims: peak memory ≤ 2 GB without the page cache; ≥ 0.5 × a cold-cache cp's speed, fsync included. `--layers N`: fewer layers of the same
tensors; `--processes N`: pruning is shared. Random bf16 weights; up to 33 GB below TMPDIR at a time, removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from common import write_result

CONFIG = Path("configs/architectures/llama31_8b.json")
LAYERS, WIDTH = 32, {"hidden": 3072, "ffn": 9216}
"""Of the source, and of P2's 4B by width."""
COPIES = 2.1
"""Of the source, the most that lie on the disk at a time."""
PEAK_GB, RATIO = 2.0, 0.5
"""What is claimed."""
SAMPLE_SECONDS = 0.05


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("--layers", type=int, default=LAYERS)
    asked.add_argument("--processes", type=int, default=1, help="that prune; import and export are one")
    asked.add_argument("--rounds", type=int, default=3)
    arguments = asked.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR"), prefix="streams_") as folder:
        layers = fitting(arguments.layers, Path(folder))
        figures = measure(Path(folder), layers, arguments.processes, arguments.rounds)
    write_result("streams", "Streams at the disk's speed", text(figures), figures) if layers == LAYERS else print(
        f"{text(figures)}\n{json.dumps(figures)}"
    )


def fitting(layers: int, folder: Path) -> int:
    """As many of the layers as the disk holds, said where that is fewer."""
    free = shutil.disk_usage(folder).free - (2 << 30)
    most = next((fewer for fewer in range(layers, 0, -1) if COPIES * source_bytes(fewer) <= free), 0)
    if most == 0:
        raise SystemExit(f"{folder}: {free / 1e9:.0f} GB free are too few; set TMPDIR to a folder on another disk")
    if most < layers:
        print(f"{free / 1e9:.0f} GB free: {most} layers of {layers}, {source_bytes(most) / 1e9:.1f} GB; the figures are those of that size")
    return most


def source_bytes(layers: int) -> int:
    config = json.loads(CONFIG.read_text())
    hidden, ffn, head = config["hidden_size"], config["intermediate_size"], config["hidden_size"] // config["num_attention_heads"]
    a_layer = hidden * (2 * hidden + 2 * config["num_key_value_heads"] * head + 3 * ffn + 2)
    return 2 * (2 * config["vocab_size"] * hidden + layers * a_layer + hidden)


def measure(folder: Path, layers: int, processes: int, rounds: int) -> dict[str, Any]:
    """Each stage in turns with a cp of what it reads; what no later stage needs is removed."""
    write_source(folder / "source", layers)
    recipe = write_recipe(folder, processes)
    run, figures = folder / "runs" / "streams", {}
    figures["import"] = in_turns("import", recipe, folder / "source", run / "import", rounds)
    shutil.rmtree(folder / "source")
    (folder / "source").mkdir()
    write_config(folder / "source", layers)
    figures["prune"] = in_turns("prune", recipe, run / "import" / "checkpoint", run / "prune", rounds)
    stand_in_for_distillation(recipe, run)
    figures["export"] = in_turns("export", recipe, run / "prune" / "checkpoint", run / "export", rounds)
    return {"layers": layers, "source_gb": source_bytes(layers) / 1e9, "processes": processes, **figures}


def in_turns(stage: str, recipe: Path, source: Path, target: Path, rounds: int) -> dict[str, Any]:
    """Medians over rounds of a cp and the stage; GB moved are half of what is read and written together: a cp of n bytes moves n."""
    copies, stages = [], []
    for _ in range(rounds):
        copies.append(seconds_of_cp(source))
        shutil.rmtree(target, ignore_errors=True)
        stages.append(run_stage(stage, recipe))
    read, written = size_of(source), size_of(target)
    moved, cp_speed = (read + written) / 2e9, size_of(source) / 1e9 / median(copies)
    seconds, working = median(x["seconds"] for x in stages), median(x["working_seconds"] for x in stages)
    peak, ratio = max(x["peak_gb"] for x in stages), moved / seconds / cp_speed
    return {
        "holds": peak <= PEAK_GB and ratio >= RATIO,
        "read_gb": read / 1e9,
        "written_gb": written / 1e9,
        "seconds": seconds,
        "working_seconds": working,
        "gb_per_s": moved / seconds,
        "cp_gb_per_s": cp_speed,
        "ratio": ratio,
        "ratio_without_start": moved / working / cp_speed,
        "peak_gb": peak,
        "resting_gb": max(x["resting_gb"] for x in stages),
        "all_seconds": [x["seconds"] for x in stages],
        "all_cp_seconds": copies,
    }


def seconds_of_cp(source: Path) -> float:
    """Of a copy that is on the disk, out of a source that is in no cache."""
    target = source.with_name("copied")
    forget()
    started = time.monotonic()
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in target.rglob("*"):
        sync(path)
    seconds = time.monotonic() - started
    shutil.rmtree(target)
    return seconds


def sync(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def forget() -> None:
    """Empties the page cache; root may."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def run_stage(stage: str, recipe: Path) -> dict[str, float]:
    """The verb as a user runs it: seconds of the command and of the stage alone, GB of all its processes at most and before the work began."""
    forget()
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "minitron_megatron.cli", stage, str(recipe)])
    sampled = Sampler(process.pid)
    code = process.wait()
    seconds, seen = time.monotonic() - started, sampled.stop()
    if code:
        raise SystemExit(f"minitron {stage} failed")
    manifest = json.loads((recipe.parent / "runs" / "streams" / stage / "manifest.json").read_text())
    before = [size for when, size in seen if when < seconds - manifest["seconds"] - 1] or [0]
    return {"seconds": seconds, "working_seconds": manifest["seconds"], "peak_gb": max(size for _, size in seen), "resting_gb": max(before)}


class Sampler:
    """Samples the memory of a process and of those that it starts, without the page cache."""

    def __init__(self, pid: int) -> None:
        self._pid, self._seen, self._ended = pid, [(0.0, 0.0)], threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        started = time.monotonic()
        while not self._ended.wait(SAMPLE_SECONDS):
            self._seen.append((time.monotonic() - started, sum(map(proportional_bytes, family(self._pid))) / 1e9))

    def stop(self) -> list[tuple[float, float]]:
        """Seconds since the start → GB."""
        self._ended.set()
        self._thread.join()
        return self._seen


def family(pid: int) -> list[int]:
    children = [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in (read_proc(task) or "").split()]
    return [pid, *(one for child in children for one in family(child))]


def proportional_bytes(pid: int) -> int:
    """A process's own pages and its share of those that several map, as far as no file lies behind them."""
    lines = (read_proc(Path(f"/proc/{pid}/smaps_rollup")) or "").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def read_proc(path: Path) -> str | None:
    """None for a process that has ended."""
    try:
        return path.read_text()
    except OSError:
        return None


def write_source(folder: Path, layers: int) -> None:
    """Random weights in safetensors of about 1 GB, one layer's or one vocabulary's at a time."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    config = write_config(folder, layers)
    noise, weight_map = (torch.randn(1 << 27, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16(), {}

    def draw(number: int, *shape: int) -> torch.Tensor:
        size = torch.Size(shape).numel()
        return noise.roll(number * 104_729).repeat(-(-size // len(noise)))[:size].view(shape)

    for number, shard in enumerate(shards(config)):
        file = f"model-{number:05d}.safetensors"
        save_file({name: draw(number * 16 + place, *shape) for place, (name, shape) in enumerate(shard.items())}, folder / file, {"format": "pt"})
        sync(folder / file)
        weight_map.update(dict.fromkeys(shard, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shards(config: dict[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = config["num_key_value_heads"] * hidden // config["num_attention_heads"]
    a_layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    layers = [{f"model.layers.{layer}.{name}.weight": shape for name, shape in a_layer.items()} for layer in range(config["num_hidden_layers"])]
    ends = {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    return [{"model.embed_tokens.weight": (vocab, hidden)}, *layers, ends]


def write_config(folder: Path, layers: int) -> dict[str, Any]:
    config = {**json.loads(CONFIG.read_text()), "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    return config


def write_recipe(folder: Path, processes: int) -> Path:
    import yaml

    values = {
        "name": "streams",
        "runs": str(folder / "runs"),
        "platform": "cpu",
        "model": {"path": str(folder / "source")},
        "data": {"train": [str(folder / "none.jsonl")]},
        "parallel": {"data": processes},
        "prune": {"scores": "random", "target": WIDTH},
        "distill": {"steps": 100, "global_batch": 8 * processes},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def stand_in_for_distillation(recipe: Path, run: Path) -> None:
    """An artifact with the pruned weights where `export` looks for the distilled ones: a distillation is no part of what is measured."""
    from minitron_megatron.artifact import publish
    from minitron_megatron.chain import STAGES, stage_settings
    from minitron_megatron.config.family import load_recipe

    partial = run / ".distill.partial"
    partial.mkdir()
    (partial / "checkpoint").symlink_to(run / "prune" / "checkpoint")
    settings = stage_settings(STAGES["distill"], load_recipe(str(recipe), []))
    publish(run, "distill", {"stage": "distill", "id": "stand-in", "settings": settings, "inputs": {}}, {})


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def text(figures: dict[str, Any]) -> str:
    scaled = "" if figures["layers"] == LAYERS else f", {figures['layers']} of its {LAYERS} layers"
    rows = [row(stage, figures[stage]) for stage in ("import", "prune", "export")]
    return "\n".join(
        [
            f"Llama-3.1-8B's shape{scaled}, random bf16 weights ({figures['source_gb']:.1f} GB) → hidden 3072, FFN 9216 (P2's 4B by width).",
            f"Seconds of the whole command (in brackets: without its start), cold cache, fsync included, medians in turns with a cp of what the "
            f"stage reads. Speed: half of the bytes read and written, a second, as cp has it. Prune: {figures['processes']} process(es).",
            f"Claimed: a ratio of {RATIO} or more and a peak of {PEAK_GB:.0f} GB or less. Peak: anonymous and "
            "shared memory of all processes of the command (Pss), without the page cache; at rest: after the imports.",
            "",
            "| stage | read, GB | written, GB | seconds | GB/s | cp, GB/s | ratio to cp | peak, GB | at rest, GB |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
            *rows,
        ]
    )


def row(stage: str, x: dict[str, Any]) -> str:
    cells: list[str] = [stage, f"{x['read_gb']:.2f}", f"{x['written_gb']:.2f}", f"{x['seconds']:.1f} ({x['working_seconds']:.1f})"]
    cells += [f"{x['gb_per_s']:.2f}", f"{x['cp_gb_per_s']:.2f}", f"{x['ratio']:.2f} ({x['ratio_without_start']:.2f})"]
    return "| " + " | ".join([*cells, f"{x['peak_gb']:.2f}", f"{x['resting_gb']:.2f}"]) + " |"


if __name__ == "__main__":
    main()
