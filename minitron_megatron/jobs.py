"""What slurm/pipeline_8b_to_4b.sh asks of a recipe: `python -m minitron_megatron.jobs RECIPE [key=value…]` prints the stages that are to be
run, one a line, each with the folder in which its status.json will be.
"""

from __future__ import annotations

import sys

from minitron_megatron.artifact import find_artifact, partial_folder
from minitron_megatron.chain import Stage, finished, outside_files, run_folder, stages_of
from minitron_megatron.config.family import load_recipe
from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import MinitronError
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


def main(arguments: list[str]) -> int:
    """Exit code 2 for what does not fit, told before a job waits in the queue."""
    try:
        if not arguments:
            raise MinitronError("jobs: which recipe? python -m minitron_megatron.jobs RECIPE [key=value…]")
        path, *overrides = arguments
        prepared, _ = prepare(path, overrides, needs_device=False)
        recipe = prepared.model_copy(update={"precision": load_recipe(path, overrides).precision})
        for stage in stages_of(recipe):
            outside_files(stage, recipe)
        for name in open_stages(recipe):
            print(name, partial_folder(run_folder(recipe), name).resolve())
    except MinitronError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
