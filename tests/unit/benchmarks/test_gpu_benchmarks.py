"""benchmarks/gpu without a GPU: what its tables say of figures, what it counts ahead, and that every script runs on small shapes."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e.tiny_model import write_model, write_recipe, write_text

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = [str(ROOT / "benchmarks" / "gpu"), str(ROOT / "benchmarks")]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the folder by name, as its scripts do."""
    for folder in reversed(FOLDERS):
        monkeypatch.syspath_prepend(folder)
    return importlib.import_module


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_NNT", "matrix products"),
        ("sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize64x128x128_cublas", "matrix products"),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<...>>", "matrix products"),
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<...>>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel<..., __nv_bfloat16, __nv_fp8_e4m3, ...>", "norms, rotary, gates"),
        ("void transformer_engine::fused_rope_forward_kernel<__nv_bfloat16>", "norms, rotary, gates"),
        ("transformer_engine::detail::cast_transpose_fused_kernel_notaligned<...>", "FP8 casts"),
        ("void transformer_engine::(anonymous namespace)::amax_kernel<8, true, __nv_bfloat16>", "FP8 casts"),
        ("multi_tensor_apply_kernel<..., AdamFunctorMaster<__nv_bfloat16, float, int>>", "optimizer"),
        ("triton_red_fused_exp_max_sub_sum_0", "compiled element-wise work (KD loss, fused gates)"),
        ("Memcpy DtoD (Device -> Device)", "copies and zeroing"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, ...>", "copies and zeroing"),
        ("void at::native::elementwise_kernel<128, 4, ...add...>", "element-wise work"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
        ("something_new", "other"),
    ],
)
def test_kernels_are_told_by_their_names(name: str, kind: str, module: Any) -> None:
    assert module("kernel_classes").kernel_class(name) == kind


def test_the_multiply_adds_of_a_step_are_those_of_its_matrices_and_of_causal_attention(module: Any) -> None:
    planned, shapes = module("planned"), module("shapes")
    models, sequence = shapes.shapes(tiny=False), 4096
    plan = planned.plan_of(models.teacher, models.width, planned.settings_of(sequence), shapes.precision("bf16", emulated=False))

    def forward(hidden: int, ffn: int) -> int:
        """Of a token: 32 heads and 8 groups of 128 channels in 32 layers; scores and weighted values over half of the sequence."""
        layer = hidden * (32 + 16) * 128 + 32 * 128 * hidden + 3 * hidden * ffn
        return 2 * (32 * layer + 128_256 * hidden) + 32 * 2 * 2 * 32 * 128 * sequence // 2

    assert planned.step_flops(plan) == 16384 * (forward(4096, 14336) + 3 * forward(3072, 9216))


def test_more_layers_are_tried_on_a_larger_card_and_all_of_them_where_they_fit(module: Any) -> None:
    planned, shapes = module("planned"), module("shapes")
    models, bf16 = shapes.shapes(tiny=False), shapes.precision("bf16", emulated=False)
    sizes = [planned.most_layers(models.teacher, models.width, planned.settings_of(4096), bf16, gib << 30) for gib in (20, 60, 80, 139)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[1] < sizes[2] < 32 and sizes[3] == 32
    half = planned.plan_of(models.teacher.resized(layers=16), models.width.resized(layers=16), planned.settings_of(4096), bf16)
    assert planned.memory_of(half).total <= planned.memory_of(planned.plan_of(models.teacher, models.width, planned.settings_of(4096), bf16)).total


def case(precision: str, layers: int, side: str, seconds: float, **more: Any) -> dict[str, Any]:
    known = {"precision": precision, "sequence": 4096, "layers": layers, "tokens": 1000, "planned_gib": 9.0, "model_flops": 989e12 * 0.5}
    return {**known, "peaks": {"bf16": 989e12, "fp8": 1979e12}, "side": side, "seconds": seconds, "peak_gib": 8.0, **more}


def test_a_table_sets_fp8_against_bf16_of_the_same_depth_and_a_step_against_its_parts(module: Any) -> None:
    table = module("step_table")
    ours, teacher, student = table.OURS, table.TEACHER, table.STUDENT
    cases = [
        case("bf16", 8, ours, 1.0),
        case("bf16", 8, teacher, 0.3),
        case("bf16", 8, student, 0.5),
        case("bf16", 16, ours, 5.0),
        case("delayed", 8, ours, 0.8, micro_batch=1),
        case("delayed", 8, ours, 0.7, micro_batch=2),
        {"precision": "blockwise", "error": "no memory"},
    ]
    plain, deep, fp8, other = table.rows(cases)
    assert plain[3:7] == ["1.000 s", "1,000", "50.0%", "–"] and plain[9:] == ["1.25", "–"]
    assert deep[9:] == ["–", "–"]
    assert other[1] == "2 × 4,096" and other[9:] == ["–", "–"]  # nothing in bf16 to be held against
    assert fp8[9:] == ["–", "1.25"] and fp8[6] == f"{0.5 * 989 / 0.8 / 1979:.1%}"


def test_what_was_measured_at_two_depths_is_carried_on_to_all_layers(module: Any) -> None:
    table = module("step_table")
    whole, steps = 32, {8: 2 + 8 * 0.25, 12: 2 + 12 * 0.25}
    cases = [case("bf16", layers, table.OURS, seconds) for layers, seconds in steps.items()]
    [found] = table.extrapolated([*cases, case("delayed", 8, table.OURS, 1.0)], Namespace(tiny=False))
    assert found["seconds"] == pytest.approx(2 + whole * 0.25) and found["tokens_per_second"] == pytest.approx(1000 / 10)


def test_the_forecast_in_the_document_is_the_one_that_is_counted(module: Any) -> None:
    page = module("predict").page(Namespace(sequences=[4096, 8192], tiny=False))
    written = (ROOT / "docs" / "performance.md").read_text().splitlines()
    assert [line for line in page if line not in written] == []


def test_the_status_page_names_every_group_and_part_that_is_to_be_run() -> None:
    page = (ROOT / "docs" / "gpu_status.md").read_text()
    groups = re.search(r"every=\((.*)\)", (ROOT / "tests/gpu/run_all.sh").read_text())
    parts = re.findall(r"^# PART[^:]*:(.*?)By default", (ROOT / "benchmarks/gpu/run_all.sh").read_text(), re.DOTALL | re.MULTILINE)
    assert groups and parts
    named = [*groups[1].split(), *re.findall(r"([a-z][a-z0-9_]+) +\(\d", parts[0])]
    assert len(named) > 15 and [name for name in named if not re.search(rf"\b{name}\b", page)] == []


def test_curves_hold_every_validation_over_the_tokens_seen(module: Any) -> None:
    curves, figure = module("curves"), module("curves_figure")
    step = {"loss": 1.0, "tokens_per_second": 50.0, "seconds": 2.0, "memory_gib": 1.0}
    records = [
        {"step": 0, "validation": {"forward_kl": 2.0, "perplexity": 9.0}},
        {"step": 1, **step},
        {"step": 2, **step, "validation": {"forward_kl": 1.0, "perplexity": 8.0}},
    ]
    found = curves.of_log(records)
    assert [(point["tokens"], point["forward_kl"]) for point in found["points"]] == [(0, 2.0), (200, 1.0)]
    drawn = figure.curves_svg({"bf16": found["points"], "delayed": found["points"]})
    assert drawn.count("<svg") == 1 and "bf16" in drawn and "delayed" in drawn


@pytest.fixture
def bf16_that_was_stopped(tmp_path: Path) -> Path:
    """A folder of runs: the first stages but for prune, which was cut off, and a distillation that was ended when its time was over."""
    run = tmp_path / "bf16" / "tiny"
    for stage in ("import", "data", "importance"):
        (run / stage).mkdir(parents=True)
        (run / stage / "manifest.json").touch()
    for stage in (".prune.partial", ".distill.partial"):
        (run / stage).mkdir()
        (run / stage / "metrics.jsonl").write_text('{"step": 0}\n')
    return tmp_path


def test_a_distillation_that_is_refused_is_not_told_by_the_log_of_another(
    module: Any, bf16_that_was_stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves, runs = module("curves"), bf16_that_was_stopped
    begun: list[tuple[str, bool]] = []
    monkeypatch.setattr(curves.subprocess, "run", lambda command, **_: begun.append((command[3], "fp8.student=delayed" in command)))
    monkeypatch.setattr(curves, "until", lambda ends, command: 2)
    asked = Namespace(minutes=1.0, device="cuda", tiny=True, recipe=Path("recipe.yaml"), set=[])
    with pytest.raises(RuntimeError, match="delayed: the distillation ended with 2"):
        curves.distilled("delayed", runs, asked)
    assert begun == [("prune", False), ("prune", True)]  # what was cut off, and the same cut under the name that FP8 gives it
    assert [path.name for path in (runs / "delayed").rglob("*") if "distill" in path.name or "prune" in path.name] == []
    shutil.copytree(runs / "bf16" / "tiny" / ".distill.partial", runs / "delayed" / "tiny" / ".distill.partial")  # of an earlier start of its own
    with pytest.raises(RuntimeError, match="delayed: the distillation ended with 2"):
        curves.distilled("delayed", runs, asked)


def test_a_distillation_is_ended_in_time_and_killed_where_it_does_not_end(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    curves = module("curves")
    monkeypatch.setattr(curves, "SAVING_SECONDS", 0.5)

    def ended(seconds: float, script: str) -> int:
        return int(curves.until(time.monotonic() + seconds, ["sh", "-c", script]))

    assert ended(60, "exit 3") == 3
    assert ended(0.3, "trap 'exit 9' TERM; while :; do sleep 0.1; done") == 9
    assert ended(0.3, "trap '' TERM; while :; do sleep 0.1; done") == curves.STOPPED


def test_figures_of_transformer_engines_layers_are_refused_where_it_does_not_import(module: Any) -> None:
    """A CPU: megatron's own layers would be measured under its name."""
    module("options").require_engine("cpu")
    with pytest.raises(SystemExit, match=r"Transformer Engine: .*these figures are of its layers"):
        module("options").require_engine("cuda")


def test_fp8_steps_without_bf16_beside_them_are_named(module: Any) -> None:
    table = module("step_table")
    cases = [case("bf16", 8, table.OURS, 1.0), case("delayed", 8, table.OURS, 0.8), case("delayed", 16, table.OURS, 1.6)]
    assert table.without_bf16(cases[:2]) == []
    assert table.without_bf16(cases) == ["- delayed, 1 × 4,096, 16 layers: no bf16 beside it in this folder", ""]


def test_a_case_is_written_before_the_process_that_measures_has_ended(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = module("step")
    monkeypatch.setattr(step, "LIMIT_SECONDS", 2)
    script = f"""echo '{json.dumps(case("bf16", 8, "distillation", 1.0))}'; echo warned; printf '{{"side": "cut o'; exec sleep 60"""
    asked, path = Namespace(tiny=True, out=tmp_path, device="cpu", precisions=["bf16"]), tmp_path / "gpu_step.json"
    told = step.told_by("bf16", ["sh", "-c", script])

    def interrupted_behind_the_first() -> Iterator[dict[str, Any]]:
        yield next(told)
        assert [one["seconds"] for one in json.loads(path.read_text())["figures"]["cases"]] == [1.0]
        assert "had not ended" in (tmp_path / "gpu_step.md").read_text()
        raise KeyboardInterrupt

    step.report_all(interrupted_behind_the_first(), asked)
    page = (tmp_path / "gpu_step.md").read_text()
    assert page in capsys.readouterr().out and "| bf16 | 1 × 4,096 | 8 | 1.000 s |" in page and "interrupted" in page
    [late] = list(told)
    assert late == {"precision": "bf16", "error": "not finished within 2 s"}


def test_a_side_of_the_loss_that_fails_leaves_the_others_their_figures(module: Any) -> None:
    def broken(case: Any) -> float:
        raise ImportError("libcudart.so.12: cannot open shared object file\nmore")

    loss = module("loss")
    found = {"theirs": loss.apart(broken, None, 2.0), "ours": loss.apart(lambda case: 2.1, None, 2.0)}
    assert [loss.told(value) for value in found.values()] == ["failed (ImportError: libcudart.so.12: cannot open shared object file)", "5.0e-02"]


SCRIPTS = {
    "step": ["--precisions", "bf16", "tensorwise", "--layers", "1", "2", "--sequences", "64", "--profile", "--no-peer"],
    "loss": [],
    "importance": [],
    "throughput": ["--batches", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_runs_on_a_cpu_and_writes_its_result(name: str, tmp_path: Path) -> None:
    found = run(name, tmp_path, *SCRIPTS[name])
    assert found["tiny"] and found["figures"] and found["machine"] and found["versions"]["megatron-core"]
    assert "error" not in json.dumps(found["figures"])
    assert "figures mean nothing" in (tmp_path / f"gpu_{name}.md").read_text()


@pytest.mark.slow
def test_the_curves_are_those_of_distillations_through_all_stages(tmp_path: Path) -> None:
    out, steps = tmp_path / "out", ["--recipe", str(tiny_recipe(tmp_path)), "--runs", str(tmp_path / "runs")]
    run("curves", out, *steps, "--variants", "bf16")
    found = run("curves", out, *steps, "--variants", "delayed")["figures"]
    first, rounded = ([point["forward_kl"] for point in found[name]["points"]] for name in ("bf16", "delayed"))
    assert len(first) == len(rounded) == 3
    assert first != rounded and rounded == pytest.approx(first, rel=0.3)  # the same student on the same tokens, rounded to 3 bits: 14 % seen
    assert (out / "gpu_curves.svg").read_text().count("<svg") == 1


def run(name: str, out: Path, *options: str) -> dict[str, Any]:
    environment = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(out), "PYTHONPATH": str(ROOT)}
    command = ["bash", str(ROOT / "benchmarks/gpu/run.sh"), name, "--device", "cpu", "--tiny", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / f"gpu_{name}.json").read_text())


def tiny_recipe(folder: Path) -> Path:
    write_text(folder / "text")
    write_model(folder / "model", folder / "text", hidden_size=64, intermediate_size=128, head_dim=16, num_attention_heads=4)
    path = write_recipe(folder)
    recipe = yaml.safe_load(path.read_text())
    recipe["prune"]["target"] = {"layers": 3, "ffn": 96}
    path.write_text(yaml.safe_dump(recipe))
    return path
