#!/usr/bin/env bash
# One benchmark of this folder: `bash benchmarks/gpu/run.sh step --tokens 4096`; on a laptop, to see that it runs at all: `… step --device cpu --tiny`.
# PYTHON names the interpreter where it is not the checkout's .venv; what PYTHONPATH names (Transformer Engine unpacked, for example) comes behind.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
name=${1:?"which one: step, loss, importance, throughput, curves or predict"}
shift
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=python3
export PYTHONPATH="$root:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# memory and threads as the launcher gives them to a worker
mapfile -t settings < <("$python" -c 'from minitron_megatron.environment import worker_environment as of; print(*map("=".join, of(1).items()), sep="\n")')
export "${settings[@]}"
exec "$python" -W ignore "$root/benchmarks/gpu/$name.py" "$@"
