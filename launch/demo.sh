#!/usr/bin/env bash
# SmolLM2-135M through the whole chain on two CPU processes. Arguments: key=value overrides of the recipe.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup.sh

python=$(find_python)
setup_environment .venv "$python" dev,export
.venv/bin/python launch/demo_inputs.py --out .demo
export HF_HUB_OFFLINE=1
# the recipe is two processes; a GPU takes one each
layout=()
[ "$(gpu_count)" = 1 ] && layout=(parallel.pipeline=1)
exec .venv/bin/minitron run configs/smollm2_135m_to_97m.yaml "${layout[@]}" "$@"
