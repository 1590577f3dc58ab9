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
from minitron_megatron.config.family import Step
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
AblationPath = Annotated[
    str, typer.Argument(metavar="ABLATION", help="YAML file with a recipe and its variants, for example configs/ablations/losses.yaml")
]
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
        "Read the source model (Hugging Face, .nemo or Megatron) into a torch_dist checkpoint, tensor by tensor.",
        "checkpoint/, hf_config.json, tokenizer/",
        "model.path=/models/Llama-3.1-8B",
    ),
    "data": StageHelp(
        "Tokenize the corpora into indexed datasets and split off the held-out documents.",
        "train, heldout and out_of_domain .bin and .idx",
        "data.workers=8",
    ),
    "chat": StageHelp(
        "Tokenize conversations for fine-tuning by the chat template, with a weight for each token (needs section `chat`).",
        "train and heldout .bin and .idx, each with -weights beside it",
        "'chat.train=[chats/*.jsonl]'",
    ),
    "importance": StageHelp(
        "Score layers, FFN neurons, attention heads and embedding channels in one forward pass.",
        "scores.safetensors (sums from which every aggregation follows), summary.json",
        "importance.samples=1024",
        " · Adding passes over other samples: `minitron importance merge --help`",
    ),
    "depth": StageHelp(
        "Choose the layers to drop: each layer or block is left out in memory, and what that does is measured.",
        "depth.json (every candidate with its standard error, the order, the layers to drop)",
        "depth.criterion=logit_error prune.target.layers=26",
        " · Part of the chain where the recipe has a section `depth`",
    ),
    "teachers": StageHelp("Import the teachers that the recipe names beside the source, or in its place.", "N/checkpoint/ for each"),
    "correct": StageHelp(
        "Train the teacher on the distillation data first; with correct.beside=true as a job beside the distillation.",
        "checkpoint/, metrics.jsonl, tensorboard/; beside: runs/NAME/corrected/ at each save",
        "correct.source_peak=6e-4 correct.steps=300",
    ),
    "labels": StageHelp(
        "Let the teacher continue training text; distillation then learns what it wrote (needs section `labels`).",
        "train and train-weights .bin and .idx",
        "labels.samples=4096 labels.new_tokens=128",
    ),
    "teacher-logits": StageHelp(
        "Store what the teacher thinks of each token; with distill.teacher_outputs=stored a distillation reads it in the teacher's place.",
        "train/ and heldout/ (blocks of consecutive samples, compressed and checksummed)",
        "teacher_logits.k=64 distill.teacher_outputs=stored",
        " · Part of the chain where the recipe has a section `teacher_logits`",
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
    "finetune": StageHelp(
        "Train the distilled student on conversations: the answers' tokens alone.",
        "checkpoint/, metrics.jsonl, tensorboard/",
        "finetune.steps=300 finetune.learning_rate.peak=1e-5",
    ),
    "evaluate": StageHelp(
        "Compare teacher, pruned and distilled model: perplexity, KL, agreement, tasks, speed, a continuation.",
        "table.md",
        "evaluate.tokens=all evaluate.task_items=all",
    ),
    "export": StageHelp(
        "Write the student as a Hugging Face model that plain transformers loads, or as a .nemo archive.",
        "model/ (config.json, safetensors, tokenizer) or model.nemo",
        "export.format=nemo",
    ),
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
        from minitron_megatron.conductor import run_stages

        raise typer.Exit(run_stages([name], recipe, overrides or []))


@app.command("run", help="Run the whole chain; finished stages whose inputs are unchanged are skipped.", rich_help_panel="The whole chain")
def run(recipe: RecipePath, overrides: Overrides = None) -> None:
    from minitron_megatron.conductor import run_steps

    steps = _steps(recipe, overrides or [])
    code = run_steps(steps, recipe, overrides or [])
    if code == 0:
        _show_results(steps, recipe)
    raise typer.Exit(code)


@app.command(
    "ablate",
    short_help="Run the variants of an ablation, with their seeds, and print one table.",
    help="Run every variant of an ablation as far as `evaluate` takes, with each seed, and print one table of their final models.\n\n"
    "What variants have in common is made once, or taken from the recipe's own run. Writes `runs/ABLATION/VARIANT[-seedN]/`, and "
    "`ablation.md` and `.json` beside them.",
    epilog="Example: `minitron ablate configs/ablations/aggregation_pairs.yaml evaluate.tokens=4096`",
    rich_help_panel="The whole chain",
)
def ablate(ablation: AblationPath, overrides: Overrides = None) -> None:
    from minitron_megatron.ablate import collect, run_trials
    from minitron_megatron.config.ablation import planned
    from minitron_megatron.results.ablation import console_ablation

    plan = planned(ablation, overrides or [])
    code = run_trials(plan)
    if code == 0:
        Console().print(console_ablation(collect(plan)))
        print(f"Table: {plan.folder / 'ablation.md'}")
    raise typer.Exit(code)


@app.command("show", help="Print the resolved recipe, both architectures, their parameters, FLOPs and KV-cache size.", rich_help_panel="Look first")
def show(recipe: RecipePath, overrides: Overrides = None) -> None:
    from minitron_megatron.config.family import checked_steps
    from minitron_megatron.show import show_recipe, show_search

    console, steps = Console(), _steps(recipe, overrides or [])
    checked = checked_steps(steps)
    for step, source, target in checked:
        if step.recipe.search:
            target = show_search(step.recipe, step.recipe.search, source, console)
        show_recipe(step.recipe, source, target, console)
    for step in steps[len(checked) :]:
        console.print(f"Step {step.name} goes on from what a search finds; once that is there, step={step.name} shows it.")


@app.command(
    "settings",
    help="List what a recipe may say: its sections, or the keys of one with their values, defaults and meanings.",
    epilog="Example: `minitron settings fp8`",
    rich_help_panel="Look first",
)
def settings(section: Annotated[str, typer.Argument(metavar="SECTION", help="a section of a recipe, for example fp8")] = "") -> None:
    from minitron_megatron.settings import settings_table

    Console().print(settings_table(section))


@app.command(
    "advise",
    help="Hold a recipe, or every step of a family, against what the papers and later work found; nothing is run.",
    epilog=f"Example: `minitron advise {DEMO}`",
    rich_help_panel="Look first",
)
def advise_recipe(recipe: RecipePath, overrides: Overrides = None) -> None:
    from minitron_megatron.advice.rules import Subject, advise
    from minitron_megatron.advice.text import told
    from minitron_megatron.config.family import checked_steps
    from minitron_megatron.search.survey import surviving

    steps = _steps(recipe, overrides or [])
    checked = checked_steps(steps)
    for step, source, target in checked:
        if step.recipe.search:
            target = surviving(step.recipe, step.recipe.search, source).largest
        print(told(advise(Subject(step, source, target)), step.name))
    for step in steps[len(checked) :]:
        print(f"step {step.name}: goes on from what a search finds; once that is there, step={step.name} is held against the findings")


@app.command(
    "plan",
    short_help="Say what every stage takes before a job is sent: memory, FLOPs, hours, traffic, disk; nothing is run.",
    help="Print, from the architectures alone, what each stage of a recipe takes: memory of the fullest rank by what it is for, FLOPs, the time of a "
    "step on a named GPU, GPU-hours, bytes that travel and bytes on disk; and how long a distillation step waits under each pipeline schedule.\n\n"
    "`cluster=FILE` names a cluster file (configs/cluster/*.yaml), whose `gpu`, `gpus_per_node`, `nodes` and `network_gb_per_s` are read. How "
    "figures come about: docs/plan.md.",
    epilog=f"Examples: `minitron plan {DEMO} --schedule schedule.svg parallel.pipeline=4 distill.global_batch=16`, "
    "`minitron plan configs/llama31_8b_to_4b_width.yaml --layouts --gpu H200-141GB --nodes 2`",
    rich_help_panel="Look first",
)
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    schedule: Annotated[Path | None, typer.Option(metavar="FILE", help="draw the recipe's pipeline as a Gantt picture (.svg)")] = None,
    layouts: Annotated[
        bool, typer.Option("--layouts", help="try every layout, micro-batch and recomputation; the fastest that fit, and why others do not")
    ] = False,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="in place of the cluster file's: A100-80GB, H100-80GB, H200-141GB, B200-180GB")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="in place of the cluster file's; data parallelism takes what they have")] = None,
    matrix_share: Annotated[float | None, typer.Option(min=0.01, max=1, help="share of the GPU's peak that matrix products reach")] = None,
) -> None:
    from minitron_megatron.plan.cluster import read_cluster, split_overrides
    from minitron_megatron.plan.command import plan_steps
    from minitron_megatron.plan.gpus import Shares

    of_recipe, cluster_file = split_overrides(overrides or [])
    cluster = read_cluster(cluster_file, gpu=gpu, nodes=nodes)
    shares = Shares(matrix_share) if matrix_share else Shares()
    plan_steps(recipe, of_recipe, cluster, shares, Console(), schedule=schedule, layouts=layouts)


@app.command(
    "doctor",
    help="Print what this machine has (GPU, NCCL, Transformer Engine, apex, FP8, SLURM) and what follows; exit code 1 where it is broken.",
    rich_help_panel="Look first",
)
def doctor() -> None:
    from minitron_megatron.platform.doctor import doctor_table, exit_code, inspect_machine

    findings = inspect_machine()
    Console().print(doctor_table(findings))
    raise typer.Exit(exit_code(findings))


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


def _steps(recipe: str, overrides: list[str]) -> list[Step]:
    """One for an ordinary recipe; of a family all, or the one that `step=NAME` picks."""
    from minitron_megatron.config.family import picked_steps

    return picked_steps(recipe, overrides)


def _show_results(steps: list[Step], recipe_path: str) -> None:
    from minitron_megatron.artifact import open_artifact
    from minitron_megatron.chain import run_folder
    from minitron_megatron.results.family import publish_family
    from minitron_megatron.results.table import console_table, continuations

    console = Console()
    evaluated = {step.name: open_artifact(run_folder(step.recipe), "evaluate", recipe_path).result for step in steps if step.trained}
    if not evaluated:  # one step was named, of which the next takes the pruned model
        console.print(f"Pruned: {run_folder(steps[-1].recipe) / 'prune'}")
        return
    result = publish_family(evaluated, run_folder(steps[-1].recipe).parent) if len(evaluated) > 1 else next(iter(evaluated.values()))
    console.print(console_table(result))
    console.print(continuations(result), markup=False, highlight=False)
    for step in steps:
        if step.trained:
            console.print(f"Report: {run_folder(step.recipe) / 'report' / 'report.html'}")


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2."""
    started = time.monotonic()
    try:
        app()
    except MinitronError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    finally:
        if sys.argv[1:2] in (["run"], ["ablate"]) and time.monotonic() - started > 60:
            print(f"total: {(time.monotonic() - started) / 60:.1f} minutes", file=sys.stderr)


if __name__ == "__main__":
    main()
