"""`python -m minitron_megatron.processes STAGE RECIPE [key=value…]`: how many processes the stage takes, for launch/torchrun.sh."""

from __future__ import annotations

import sys

from minitron_megatron.chain import STAGES
from minitron_megatron.config.load import load_recipe
from minitron_megatron.errors import MinitronError


def main(stage: str, recipe: str, *overrides: str) -> int:
    try:
        loaded = load_recipe(recipe, list(overrides))
        if stage not in STAGES:
            raise MinitronError(f"unknown stage '{stage}'; stages: {', '.join(STAGES)}")
        print(loaded.parallel.processes if STAGES[stage].distributed else 1)
        return 0
    except MinitronError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
