"""An import hook that loads megatron.core aimed at CPU processes; nothing in torch or on disk is changed.

Why rewrite sources: replacing attributes of `torch.cuda` at run time would change torch for everybody in the process,
and would still miss the type strings ("torch.cuda.FloatTensor") that megatron's optimizer compares. The rewrites of
`CudaToCpu` and the amendments at the end are all there is.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.abc
import importlib.util
import marshal
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch

from minitron_megatron.errors import PlatformError
from minitron_megatron.platform import group_adam, rotary

STAND_IN_MODULE = "minitron_megatron.platform.cuda_for_cpu"
STAND_IN_NAME = "__cuda_for_cpu__"  # ends in underscores too: inside a class body it is not mangled
DENSE_TENSORS = ("Float", "Half", "BFloat16")
CPU_CONSTANTS = {"cuda": "cpu"} | {f"torch.cuda.{kind}Tensor": f"torch.{kind}Tensor" for kind in DENSE_TENSORS}


class CudaToCpu(ast.NodeTransformer):
    """Rewrites one module's syntax tree and counts the places."""

    def __init__(self) -> None:
        self.places = 0

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        """ "cuda" → "cpu", and the type strings of dense tensors."""
        if not isinstance(node.value, str) or node.value not in CPU_CONSTANTS:
            return node
        return self._replace(node, ast.Constant(CPU_CONSTANTS[node.value]))

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """torch.cuda → the stand-in module."""
        self.generic_visit(node)
        if node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return self._replace(node, ast.Name(STAND_IN_NAME, ast.Load()))
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """x.cuda(...) → x.cpu()."""
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            return self._replace(node, ast.Call(ast.Attribute(node.func.value, "cpu", ast.Load()), [], []))
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        """from torch.cuda import … → from the stand-in."""
        if node.module != "torch.cuda" or node.level != 0:
            return node
        return self._replace(node, ast.ImportFrom(STAND_IN_MODULE, node.names, 0))

    def _replace(self, old: ast.AST, new: ast.AST) -> ast.AST:
        self.places += 1
        return ast.fix_missing_locations(ast.copy_location(new, old))


class RetargetingLoader(SourceFileLoader):
    """Compiles the rewritten source; the file on disk and its __pycache__ stay as they are."""

    def get_code(self, fullname: str) -> CodeType | None:
        path = self.get_filename(fullname)
        source = self.get_data(path)
        if b"cuda" not in source:
            return super().get_code(fullname)
        return _cached_code(source, path)

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if amend := _amendments().get(module.__name__):
            amend(module)


class RetargetingFinder(importlib.abc.MetaPathFinder):
    """Gives the modules of `packages`, and no others, the retargeting loader."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = tuple(packages)

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not any(fullname == package or fullname.startswith(package + ".") for package in self.packages):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:  # not: compiled extensions
            spec.loader = RetargetingLoader(spec.loader.name, spec.loader.path)
        return spec


def install(packages: Sequence[str] = ("megatron.core",)) -> None:
    """Put the hook first in line; a second call for the same packages does nothing.

    Raises PlatformError where a module of `packages` is loaded already: it would still be aimed at CUDA.
    """
    if any(isinstance(finder, RetargetingFinder) and finder.packages == tuple(packages) for finder in sys.meta_path):
        return
    for package in packages:
        if package in sys.modules:
            raise PlatformError(
                f"platform.activate('cpu'): {package} was imported before; call activate() before the first import of "
                f"{package} (a module that imports it at its top must be imported later)"
            )
    sys.meta_path.insert(0, RetargetingFinder(packages))


def retargeted_places(package: str = "megatron.core") -> dict[str, int]:
    """Module name → number of rewritten places, for the modules that have any; reads sources, imports no module.

    Raises PlatformError where the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise PlatformError(f"{package} is not installed in {sys.prefix}; pip install megatron-core")
    root = Path(spec.submodule_search_locations[0])
    counted = {_module_name(package, root, file): _places_in(file.read_bytes()) for file in sorted(root.rglob("*.py"))}
    return {module: places for module, places in counted.items() if places}


def retarget(source: bytes, path: str = "<source>") -> tuple[ast.Module, int]:
    """The rewritten syntax tree of one module, and how many places were rewritten."""
    transformer = CudaToCpu()
    tree = transformer.visit(ast.parse(source, path))
    tree.body.insert(_first_statement(tree.body), ast.Import([ast.alias(STAND_IN_MODULE, STAND_IN_NAME)]))
    return ast.fix_missing_locations(tree), transformer.places


def _module_name(package: str, root: Path, file: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join([package, *(part for part in parts if part != "__init__")])


def _places_in(source: bytes) -> int:
    return retarget(source)[1] if b"cuda" in source else 0


def _first_statement(body: list[ast.stmt]) -> int:
    """Index after the docstring and the __future__ imports, which have to stay in front."""
    for index, statement in enumerate(body):
        is_docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        is_future = isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
        if not (is_docstring or is_future):
            return index
    return len(body)


def _cached_code(source: bytes, path: str) -> CodeType:
    """Code from the cache, else compiled now: parsing all of megatron.core takes seconds in each of many processes."""
    cached = _cache_directory() / hashlib.sha256(source + path.encode() + _hook_identity()).hexdigest()
    with contextlib.suppress(OSError, EOFError, ValueError, TypeError):  # absent or damaged: compile again
        code = marshal.loads(cached.read_bytes())
        if isinstance(code, CodeType):
            return code
    compiled: CodeType = compile(retarget(source, path)[0], path, "exec", dont_inherit=True)
    with contextlib.suppress(OSError):  # a home that cannot be written costs time, not the run
        _publish(cached, marshal.dumps(compiled))
    return compiled


def _publish(target: Path, content: bytes) -> None:
    """Write beside and rename: processes that start together see a whole file or none."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    os.replace(temporary, target)


def _cache_directory() -> Path:
    """Per user and closed to others: what lies here is executed."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "minitron_megatron" / "retargeted"


@cache
def _hook_identity() -> bytes:
    """What else decides the code: the interpreter and this file."""
    return sys.version.encode() + Path(__file__).read_bytes()


def _amendments() -> dict[str, Callable[[ModuleType], None]]:
    """What no rewrite of names mends, faults of megatron.core and what is slow on a CPU, mended right after the module's own code has run."""
    return {
        "megatron.core.transformer.moe.moe_utils": _amend_moe_utils,
        "megatron.core.utils": _amend_utils,
        "megatron.core.models.common.embeddings.rope_utils": rotary.use_in_rope_utils,
        "megatron.core.optimizer": group_adam.use_in_optimizer,
        "megatron.core.optimizer.distrib_optimizer": group_adam.use_in_distributed_optimizer,
    }


def _amend_moe_utils(module: ModuleType) -> None:
    """A name that is undefined without Transformer Engine, and a move that ignores tensors already on the CPU."""

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # as_numpy must hold on CPU as well: the token dispatcher calls numpy methods on what comes back
        return tensor.detach().numpy() if as_numpy and hasattr(tensor, "detach") else tensor

    module.__dict__.setdefault("te_general_gemm", None)
    module.__dict__["maybe_move_tensor_to_cpu"] = maybe_move_tensor_to_cpu


def _amend_utils(module: ModuleType) -> None:
    """Clipped gradients stay where they are; megatron's own stand-in for apex makes each of them anew and copies it back."""

    def local_multi_tensor_scale(chunk_size: int, noop_flag: Any, tensor_lists: Sequence[Sequence[torch.Tensor]], scale: float) -> None:
        for source, target in zip(*tensor_lists, strict=True):
            torch.mul(source, scale, out=target)

    module.__dict__["local_multi_tensor_scale"] = local_multi_tensor_scale
