#!/usr/bin/env bash
# Writes requirements/pyXY.txt, the versions that setup.py's ranges resolve to now, for this Python (or PYTHON=…).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup.sh
python=$(find_python)
name=py$("$python" -c 'import sys; print("%d%d" % sys.version_info[:2])')
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir -p requirements
rm -f "requirements/$name.txt"
setup_environment "$folder/venv" "$python" dev,export
# torch comes from setup.sh, its CUDA packages with it; the project itself is installed from the checkout
"$folder/venv/bin/pip" freeze --exclude-editable | grep -viE '^(torch|nvidia|triton|cuda|minitron)' >"requirements/$name.txt"
wc -l "requirements/$name.txt"
