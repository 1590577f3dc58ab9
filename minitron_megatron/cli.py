"""`minitron`: one verb per stage, and one for the whole chain."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from typer.core import TyperGroup

from minitron_megatron import __version__
from minitron_megatron.errors import MinitronError


class _Verbs(TyperGroup):
    """Verbs of one word, and of two (`importance merge`) where the first one is a verb with a recipe, too."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        two = " ".join(args[:2])
        return super().resolve_command(ctx, [two, *args[2:]] if two in self.commands else args)


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a smaller language model out of a large one: measure what matters, cut the rest, distil the original into what is left.\n\n"
    "Every stage reads artifacts below `runs/NAME/` and publishes one; `minitron run` does them all and skips those that are up to date.",
    epilog="A first run: `minitron show configs/smollm2_135m_to_97m.yaml`, then `minitron run configs/smollm2_135m_to_97m.yaml`.",
)

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file of one compression, for example configs/smollm2_135m_to_97m.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="key=value", help="values that replace the recipe's, for example distill.steps=300 parallel.data=2")
]


class StageHelp(NamedTuple):
    what: str
    writes: str
    example: str = ""
    beside: str = ""
    """Where to read on."""


STAGE_HELP = {
    "import": StageHelp(
        "Read the source model (Hugging Face or Megatron) into a torch_dist checkpoint, tensor by tensor.",
        "checkpoint/, hf_config.json, tokenizer/",
        "model.path=/models/Llama-3.1-8B",
    ),
    "data": StageHelp(
        "Tokenize the corpora into indexed datasets and split off the held-out documents.",
        "train, heldout and out_of_domain .bin and .idx",
        "data.workers=8",
    ),
    "importance": StageHelp(
        "Score layers, FFN neurons, attention heads and embedding channels in one forward pass.",
        "scores.safetensors (sums from which every aggregation follows), summary.json",
        "importance.samples=1024",
        " · Adding passes over other samples: `minitron importance merge --help`",
    ),
    "search": StageHelp(
        "Find the architecture: enumerate a space, filter by budgets, distil a shortlist shortly.",
        "architecture.json (what prune takes), ranking.json, table.md, pareto.svg, candidates.csv",
        "search.shortlist=8 search.jobs=2",
        " · Only where the recipe has a section `search`",
    ),
    "prune": StageHelp(
        "Cut the source down to the target architecture, tensor by tensor.",
        "checkpoint/, plan.json (what is kept), hf_config.json",
        "prune.target.ffn=768 prune.target.layers=24",
    ),
    "distill": StageHelp(
        "Train the pruned student to follow the frozen teacher; continues where it was interrupted.",
        "checkpoint/, metrics.jsonl, tensorboard/",
        "distill.steps=300 distill.learning_rate.peak=1e-4",
    ),
    "evaluate": StageHelp(
        "Compare teacher, pruned and distilled model: perplexity, KL, agreement, tasks, speed, a continuation.",
        "table.md",
        "evaluate.tokens=all evaluate.task_items=all",
    ),
    "export": StageHelp("Write the student as a Hugging Face model that plain transformers loads.", "model/ (config.json, safetensors, tokenizer)"),
    "report": StageHelp("Gather the whole run in one self-contained HTML page.", "report.html"),
}
DEMO = "configs/smollm2_135m_to_97m.yaml"


def _stage_command(name: str) -> None:
    told = STAGE_HELP[name]

    @app.command(
        name,
        short_help=told.what,
        help=f"{told.what}\n\nWrites `runs/NAME/{name}/`: {told.writes}.",
        epilog=f"Example: `minitron {name} {DEMO} {told.example}`{told.beside}",
        rich_help_panel="Stages, in order",
    )
    def command(recipe: RecipePath, overrides: Overrides = None) -> None:
        raise typer.Exit(_run_stages([name], recipe, overrides or []))


@app.command("run", help="Run the whole chain; finished stages whose inputs are unchanged are skipped.", rich_help_panel="The whole chain")
def run(recipe: RecipePath, overrides: Overrides = None) -> None:
    from minitron_megatron.chain import stages_of
    from minitron_megatron.config.load import load_recipe

    names = [stage.name for stage in stages_of(load_recipe(recipe, overrides or []))]
    code = _run_stages(names, recipe, overrides or [])
    if code == 0:
        _show_results(recipe, overrides or [])
    raise typer.Exit(code)


@app.command("show", help="Print the resolved recipe, both architectures, their parameters, FLOPs and KV-cache size.", rich_help_panel="Look first")
def show(recipe: RecipePath, overrides: Overrides = None) -> None:
    from minitron_megatron.arch.source import source_architecture
    from minitron_megatron.config.checks.recipe import check_recipe
    from minitron_megatron.config.load import load_recipe
    from minitron_megatron.show import show_recipe, show_search

    loaded = load_recipe(recipe, overrides or [])
    source = source_architecture(loaded.model.path, loaded.model.hf_config)
    target = check_recipe(loaded, source)
    if loaded.search:
        target = show_search(loaded, loaded.search, source, Console())
    show_recipe(loaded, source, target, Console())


@app.command(
    "doctor", help="Print what this machine has (GPU, NCCL, Transformer Engine, apex, FP8, SLURM) and what follows.", rich_help_panel="Look first"
)
def doctor() -> None:
    from minitron_megatron.platform.doctor import doctor_table, inspect_machine

    Console().print(doctor_table(inspect_machine()))


for _name in STAGE_HELP:
    _stage_command(_name)


@app.command(
    "importance merge",
    short_help="Add the scores of several passes: other data shards, other days.",
    help="Add the scores of passes over other samples (data shards, days) of one model into the file that one pass over all would give.\n\n"
    "The passes differ in `data` or in `importance.skip_samples`; `prune.scores_file=FILE` prunes by the result.",
    epilog="Example: `minitron importance merge runs/monday/importance runs/tuesday/importance --output merged.safetensors`",
    rich_help_panel="Beside the stages",
)
def merge_importance(
    parts: Annotated[list[Path], typer.Argument(metavar="PART", help="two or more scores.safetensors files, or importance artifacts that hold one")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="where the merged scores go")] = Path("merged_scores.safetensors"),
) -> None:
    from minitron_megatron.scores.merge import merge_files

    merged = merge_files(parts, output)
    print(f"{output}: {merged.samples} samples of {len(merged.origin['parts'])} parts; prune by them with: prune.scores_file={output}")


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def _run_stages(names: list[str], recipe_path: str, overrides: list[str]) -> int:
    """Starts each stage that is not up to date in its own processes; stops at the first that fails."""
    from minitron_megatron.chain import STAGES, finished, require_asked
    from minitron_megatron.launcher import launch
    from minitron_megatron.worker import prepare

    recipe, _ = prepare(recipe_path, overrides, needs_device=not all(STAGES[name].streams for name in names))
    for name in names:
        stage = STAGES[name]
        require_asked(stage, recipe, recipe_path)
        artifact = finished(stage, recipe)
        if artifact:
            print(f"{name}: up to date ({artifact.path})", flush=True)
            continue
        code = launch(name, recipe_path, overrides, recipe.parallel.processes if stage.distributed else 1)
        if code:
            return code
    return 0


def _show_results(recipe_path: str, overrides: list[str]) -> None:
    from minitron_megatron.artifact import open_artifact
    from minitron_megatron.chain import run_folder
    from minitron_megatron.config.load import load_recipe
    from minitron_megatron.results.table import console_table, continuations

    folder, console = run_folder(load_recipe(recipe_path, overrides)), Console()
    result = open_artifact(folder, "evaluate", recipe_path).result
    console.print(console_table(result))
    console.print(continuations(result), markup=False, highlight=False)
    console.print(f"Report: {folder / 'report' / 'report.html'}")


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2."""
    started = time.monotonic()
    try:
        app()
    except MinitronError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    finally:
        if "run" in sys.argv[1:2] and time.monotonic() - started > 60:
            print(f"total: {(time.monotonic() - started) / 60:.1f} minutes", file=sys.stderr)


if __name__ == "__main__":
    main()
