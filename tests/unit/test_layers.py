"""Imports go one way: walked by AST, function bodies included, because a late import is an import all the same."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "minitron_megatron"
NAME = PACKAGE.name
STAGES = {"importance", "depth", "search", "prune", "correct", "distill", "finetune", "evaluate", "convert", "labels", "teacher_logits", "report"}
# a room may import rooms of its own row and of the rows above it
ROWS = [
    {"__init__"},
    {"errors"},
    {"config", "arch"},
    {"platform", "parallel"},
    {"artifact", "progress", "status", "environment", "health"},
    {"model", "checkpoint", "data", "scores", "stored", "results", "tasks"},
    {"training", "schedule"},
    STAGES,
    {"chain"},
    {"failure"},
    {"worker", "launcher", "show", "settings", "advice", "plan"},
    {"conductor", "jobs"},
    {"ablate"},
    {"cli"},
]
ROW_OF = {room: number for number, row in enumerate(ROWS) for room in row}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(path: Path) -> set[str]:
    """Modules of this package that a file imports; `from package.room import name` is package.room.name where that is a module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return {name for name in found if name.split(".")[0] == NAME}


IMPORTS = {module: imports_of(path) for module, path in MODULES.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A path that returns to its start, or nothing: what is left after every node without imports has been taken away, again and again."""
    left = {node: set(targets) - {node} for node, targets in graph.items()}
    while free := {node for node, targets in left.items() if not targets & left.keys()}:
        left = {node: targets for node, targets in left.items() if node not in free}
    return sorted(left)


def test_the_walk_sees_late_imports_and_modules_named_in_from_imports(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from minitron_megatron.platform import retarget, activate\n    import minitron_megatron.errors\n")
    assert imports_of(file) == {f"{NAME}.platform.retarget", f"{NAME}.platform.activate", f"{NAME}.errors"}
    assert circle({"a": {"b"}, "b": {"a"}, "c": {"a"}, "d": set()}) == ["a", "b", "c"]


def test_every_room_has_its_place_in_the_order() -> None:
    rooms = {room_of(module) for module in MODULES}
    assert rooms <= ROW_OF.keys(), f"rooms without a place: {rooms - ROW_OF.keys()}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_only_go_to_the_same_row_or_below(module: str) -> None:
    own = ROW_OF[room_of(module)]
    wrong = {name for name in IMPORTS[module] if ROW_OF[room_of(name)] > own}
    assert not wrong, f"{module} imports {sorted(wrong)}"


def test_stages_never_import_each_other() -> None:
    wrong = [(a, b) for a, names in IMPORTS.items() for b in names if {room_of(a), room_of(b)} <= STAGES and room_of(a) != room_of(b)]
    assert wrong == []


def test_the_data_stage_is_not_what_other_rooms_import_of_data() -> None:
    wrong = [module for module, names in IMPORTS.items() if f"{NAME}.data.stage" in names]
    assert wrong == []


def test_there_are_no_circles_of_modules_nor_of_rooms() -> None:
    # a package's __init__ is not a module of its own circle: `room/__init__` re-exports, and nobody in the room imports it
    assert circle(IMPORTS) == []
    rooms: dict[str, set[str]] = {}
    for module, names in IMPORTS.items():
        rooms.setdefault(room_of(module), set()).update(room_of(name) for name in names)
    assert circle(rooms) == []


def test_the_command_line_starts_without_torch() -> None:
    """`minitron --help` must not wait for torch: the modules that cli imports on its top level, and theirs, name neither."""
    reached, todo = set(), [f"{NAME}.cli"]
    while todo:
        module = todo.pop()
        if module in reached or module not in MODULES:
            continue
        reached.add(module)
        body = ast.parse(MODULES[module].read_text()).body
        top = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in top if isinstance(node, ast.ImportFrom)}
        assert not {name for name in names if name.split(".")[0] in ("torch", "megatron", "transformers")}, module
        todo += [name for name in names if name.startswith(NAME)]
    assert f"{NAME}.errors" in reached


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_global_statements_and_no_assert_in_place_of_raise(path: Path) -> None:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    assert not [node.lineno for node in nodes if isinstance(node, ast.Global)]
    assert not [node.lineno for node in nodes if isinstance(node, ast.Assert)]  # python -O drops them


def test_no_file_is_called_utils() -> None:
    assert [path for path in FILES if path.stem in ("utils", "util", "helpers", "common", "misc")] == []


def test_names_of_modules_in_the_chain_exist() -> None:
    """The chain imports its stages by name, which no import walk sees."""
    from minitron_megatron.chain import STAGES as CHAIN

    for stage in CHAIN.values():
        assert f"{NAME}.{stage.module}" in MODULES
        assert room_of(f"{NAME}.{stage.module}") in STAGES | {"data"}
        assert set(stage.inputs) < CHAIN.keys()
