"""Candidates that are measured, a line of JSON each: an interrupted stage goes on behind them, under any layout."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from minitron_megatron.depth.choice import Layers, Measure
from minitron_megatron.depth.measured import Measured
from minitron_megatron.parallel.world import World

FILE = "candidates.jsonl"


class Finished:
    """What is measured already, the same on every process; the main one writes."""

    def __init__(self, folder: Path, world: World) -> None:
        self._file, self._world = folder / FILE, world
        found = _read(self._file) if world.is_main else {}
        self._found: dict[Layers, Measured] = world.from_main(found)
        if world.is_main:
            folder.mkdir(exist_ok=True)
            # anew: half a line, which a killed start leaves behind, would spoil the next one
            self._file.write_text("".join(_line(layers, measured) for layers, measured in found.items()))
        if world.is_main and found:
            print(f"depth: continues behind {len(found)} measured candidates", flush=True)

    def __len__(self) -> int:
        return len(self._found)

    def or_else(self, measure: Measure) -> Measure:
        """The same function, which remembers; every process gets the main one's figures."""

        def remembered(layers: Layers) -> Measured:
            if layers not in self._found:
                self._found[layers] = self._world.from_main(measure(layers))
                if self._world.is_main:
                    with self._file.open("a") as file:
                        file.write(_line(layers, self._found[layers]))
            return self._found[layers]

        return remembered


def _line(layers: Layers, measured: Measured) -> str:
    return json.dumps({"without": layers, **asdict(measured)}) + "\n"


def _read(file: Path) -> dict[Layers, Measured]:
    found: dict[Layers, Measured] = {}
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            fields = json.loads(line)
        except json.JSONDecodeError:
            break  # the start was killed while it wrote
        samples = {name: tuple(fields[name]) for name in ("numerators", "denominators")}
        found[tuple(fields["without"])] = Measured(fields["value"], fields["stderr"], **samples)
    return found
