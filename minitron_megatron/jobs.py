"""What slurm/pipeline_8b_to_4b.sh asks of a recipe: `python -m minitron_megatron.jobs stages RECIPE [key=value…]` prints the stages that are to be
run, one a line; `… queued RECIPE [key=value…] STAGE:JOB…` writes the ids of their jobs into their status.json.
"""

from __future__ import annotations

import sys

from minitron_megatron.artifact import find_artifact, partial_folder
from minitron_megatron.chain import STAGES, Stage, finished, outside_files, run_folder, stages_of
from minitron_megatron.config.family import load_recipe
from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import MinitronError
from minitron_megatron.status import tell
from minitron_megatron.worker import prepare


def open_stages(recipe: Recipe) -> list[str]:
    """From the first stage on that is not up to date: those behind it read what it will make."""
    stages = stages_of(recipe)
    unfinished = [number for number, stage in enumerate(stages) if finished(stage, as_made(stage, recipe)) is None]
    return [stage.name for stage in stages[unfinished[0] :]] if unfinished else []


def as_made(stage: Stage, recipe: Recipe) -> Recipe:
    """With the precision in which the stage's artifact was made, where it is the machine's choice: a login node would choose another one."""
    artifact = find_artifact(run_folder(recipe), stage.name)
    if artifact is None or recipe.precision != "auto":
        return recipe
    return recipe.model_copy(update={"precision": artifact.manifest["recipe"]["precision"]})


def tell_queued(recipe: Recipe, jobs: dict[str, str]) -> None:
    """Below runs/NAME, which may not exist yet."""
    for stage, job in jobs.items():
        folder = partial_folder(run_folder(recipe), stage)
        folder.mkdir(parents=True, exist_ok=True)
        tell(folder, "queued", job=job)


def main(arguments: list[str]) -> int:
    try:
        if len(arguments) < 2 or arguments[0] not in ("stages", "queued"):
            raise MinitronError(f"jobs: {' '.join(arguments)}: not of the form stages RECIPE … or queued RECIPE … STAGE:JOB")
        verb, path, *rest = arguments
        if verb == "stages":
            prepared, _ = prepare(path, rest, needs_device=False)  # what does not fit is told before a job waits in the queue
            recipe = prepared.model_copy(update={"precision": load_recipe(path, rest).precision})
            for stage in stages_of(recipe):
                outside_files(stage, recipe)
            print("\n".join(open_stages(recipe)))
        else:
            jobs = dict(item.split(":") for item in rest if "=" not in item)
            tell_queued(load_recipe(path, [item for item in rest if "=" in item]), {name: jobs[name] for name in STAGES if name in jobs})
    except MinitronError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
