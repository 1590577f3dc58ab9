"""Claims about the import hook; whatever needs megatron.core unimported runs in a process of its own."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minitron_megatron.errors import PlatformError
from minitron_megatron.platform import retarget, versions

REPOSITORY = Path(__file__).resolve().parents[3]
PLACES = {
    (0, 16, 1): 578,
    (0, 19, 2): 747,
}  # counted on the wheels; another count: read what was added, then correct this


def start(program: str, cache: Path) -> subprocess.Popen[str]:
    """A fresh interpreter that runs `program` with a cache directory of its own."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rewritten(source: str) -> tuple[str, int]:
    tree, places = retarget.retarget(source.encode())
    return ast.unparse(tree), places


def test_every_installed_release_has_the_counted_number_of_places() -> None:
    version = versions.installed()
    if version not in PLACES:
        pytest.skip(f"megatron-core {version} was not counted yet")
    places = retarget.retargeted_places()
    assert sum(places.values()) == PLACES[version]
    assert places["megatron.core.tensor_parallel.random"] > 0


@pytest.mark.parametrize(
    ("cuda", "cpu"),
    [
        ("f(device='cuda')", "f(device='cpu')"),
        ("x.type() == 'torch.cuda.FloatTensor'", "x.type() == 'torch.FloatTensor'"),
        ("x.cuda(device, non_blocking=True)", "x.cpu()"),
        ("torch.cuda.current_device()", "__cuda_for_cpu__.current_device()"),
        ("from torch.cuda import _lazy_call", "from minitron_megatron.platform.cuda_for_cpu import _lazy_call"),
    ],
)
def test_each_way_to_name_cuda_is_aimed_at_the_cpu(cuda: str, cpu: str) -> None:
    text, places = rewritten(cuda)
    assert text.splitlines()[-1] == cpu
    assert places == 1


@pytest.mark.parametrize("source", ["get_cuda_rng_tracker()", "state['cuda_rng_state']", "self.cuda = 1", "x = 'cudagraph'"])
def test_names_that_only_contain_cuda_are_left_alone(source: str) -> None:
    assert rewritten(source)[1] == 0


def test_docstring_and_future_imports_stay_in_front() -> None:
    text, _ = rewritten('"""Doc."""\nfrom __future__ import annotations\ntorch.cuda.synchronize()')
    assert text.splitlines()[:2] == ['"""Doc."""', "from __future__ import annotations"]


def test_a_damaged_cache_entry_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    retarget._cached_code(b"name = 'cuda'", "m.py")
    (entry,) = (tmp_path / "minitron_megatron" / "retargeted").iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2])
    namespace: dict[str, str] = {}
    exec(retarget._cached_code(b"name = 'cuda'", "m.py"), namespace)
    assert namespace["name"] == "cpu"
    assert entry.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert retarget._cached_code(b"name = 'cuda'", "m.py").co_filename == "m.py"


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(PlatformError, match="no_such_package is not installed"):
        retarget.retargeted_places("no_such_package")


def test_the_hook_is_refused_after_megatron_and_kinds_are_not_switched(tmp_path: Path) -> None:
    program = """
import sys, types
from minitron_megatron.errors import PlatformError
from minitron_megatron.platform import activate
sys.modules["megatron.core"] = types.ModuleType("megatron.core")  # as an early import would leave it
try: activate("cpu")
except PlatformError as error: print(error)
del sys.modules["megatron.core"]
first = activate("cpu")
print(activate("cpu") is first, len([f for f in sys.meta_path if type(f).__name__ == "RetargetingFinder"]))
try: activate("cuda")
except PlatformError as error: print(error)
"""
    output, errors = start(program, tmp_path).communicate(timeout=60)
    early, same, switched = output.splitlines() or [errors, "", ""]
    assert "megatron.core was imported before; call activate() before" in early
    assert same == "True 1"
    assert "already runs on cpu; start a new process for cuda" in switched


def test_processes_that_start_together_share_an_empty_cache_and_leave_torch_and_the_console_as_they_were(
    tmp_path: Path,
) -> None:
    program = """
import torch
def state(): return {m.__name__: dict(vars(m)) for m in (torch.cuda, torch.distributed, torch.Tensor, torch.nn.Module)}
torch.nn.functional  # loaded lazily by nobody
before = state()
from minitron_megatron.platform import activate
activate("cpu")
activated = state()
assert activated == before, {n: set(before[n].items()) ^ set(activated[n].items()) for n in before}
import megatron.core.models.gpt.gpt_model, megatron.core.pipeline_parallel.schedules as schedules
from megatron.core.transformer.moe import moe_utils, token_dispatcher
changed = [f"{n}.{k}" for n, names in state().items() for k in before[n] if names.get(k) is not before[n][k]]
assert not changed, changed
assert schedules.torch is torch and torch.cuda.current_device.__module__ == "torch.cuda"
assert token_dispatcher.maybe_move_tensor_to_cpu(torch.ones(2), as_numpy=True).sum() == 2
assert hasattr(moe_utils, "te_general_gemm")
from megatron.core.optimizer import clip_grads
gradient = torch.randn(100)
expected, place = gradient * 0.3, gradient.data_ptr()
from torch.utils._python_dispatch import TorchDispatchMode
class Watch(TorchDispatchMode):
    seen = []
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))
with Watch():
    clip_grads.multi_tensor_scale_impl(0, None, [[gradient], [gradient]], 0.3)
assert torch.equal(gradient, expected) and gradient.data_ptr() == place
assert Watch.seen == ["aten.mul.out"], Watch.seen  # no gradient beside the gradient
print("ok")
"""
    together = [start(program, tmp_path) for _ in range(3)]
    for process in together:
        output, errors = process.communicate(timeout=180)
        assert (output.strip(), errors.strip()) == ("ok", "")
    entries = list((tmp_path / "minitron_megatron" / "retargeted").iterdir())
    assert entries
    assert all(len(entry.name) == 64 for entry in entries)  # no temporary file is left behind
