#!/usr/bin/env bash
# Writes requirements/: the versions that setup.py's ranges resolve to, for every supported Python, whether it is on this machine or not.
#   pyXY.txt      what launch/setup.sh installs (extras dev and export)
#   cpu-pyXY.txt  what docker/Dockerfile installs over a base whose torch has no CUDA (export, nemo, wandb)
#   gpu-pyXY.txt  and over one with CUDA (gpu too: Transformer Engine, with what compiles it)
# torch is in none of them, nor what comes with it (its CUDA packages, triton): setup.sh or the base brings it. cuda-bindings stays for
# images: nemo_toolkit asks for it, too.
# usage: bash launch/lock.sh [--upgrade] [NAME…], names such as py311 gpu-py312; default: all. A version that is locked and still fits
# stays; --upgrade renews them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup.sh
UV_VERSION=0.13.8
IMAGES_MEGATRON=0.16.1 # for every Python: it is built on the image's default base, and the range of Transformer Engine in setup.py is its own
PLATFORM=x86_64-manylinux_2_28
NAMES=(py310 py311 py312 cpu-py310 cpu-py311 cpu-py312 gpu-py310 gpu-py311 gpu-py312)

upgrade=no
[ "${1:-}" = --upgrade ] && upgrade=yes && shift
[ $# -gt 0 ] && NAMES=("$@")

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=$(find_python)
ensure_venv_module "$python"
"$python" -m venv "$folder/uv"
"$folder/uv/bin/pip" install -q --disable-pip-version-check "uv==$UV_VERSION"

# What an image needs beside the extras: what installs and compiles source distributions without fetching the newest of these.
build_tools() {
  case $1 in
    gpu-*) printf '%s\n' pip setuptools wheel packaging ninja pybind11 ;;
    cpu-*) printf '%s\n' pip setuptools wheel ;;
  esac
}

extras_of() {
  case $1 in
    gpu-*) echo export nemo wandb gpu ;;
    cpu-*) echo export nemo wandb ;;
    *) echo dev export ;;
  esac
}

lock() {
  local name=$1 version with_torch options=() extra
  [[ $name =~ ^((cpu|gpu)-)?py3(1[012])$ ]] || {
    echo "$name: no such lock file; one of: ${NAMES[*]}" >&2
    return 2
  }
  with_torch='^(torch==|triton==|nvidia-|cuda-)'
  case $name in cpu-* | gpu-*) with_torch='^(torch==|triton==|nvidia-|cuda-toolkit==)' ;; esac
  version=3.${BASH_REMATCH[3]}
  for extra in $(extras_of "$name"); do options+=(--extra "$extra"); done
  printf 'torch==%s\n' "$TORCH_VERSION" >"$folder/constraints.txt"
  case $name in cpu-* | gpu-*) printf 'megatron-core==%s\n' "$IMAGES_MEGATRON" >>"$folder/constraints.txt" ;; esac
  build_tools "$name" >"$folder/tools.in"
  rm -f "$folder/$name.txt"
  [ $upgrade = no ] && [ -f "requirements/$name.txt" ] && cp "requirements/$name.txt" "$folder/$name.txt"
  "$folder/uv/bin/uv" pip compile setup.py "$folder/tools.in" "${options[@]}" --config-file requirements/uv.toml \
    --python-version "$version" --python-platform $PLATFORM --constraint "$folder/constraints.txt" \
    --no-header --no-annotate --quiet --output-file "$folder/$name.txt" >/dev/null
  grep -vE "$with_torch" "$folder/$name.txt" >"requirements/$name.txt"
  wc -l "requirements/$name.txt"
}

mkdir -p requirements
for name in "${NAMES[@]}"; do lock "$name"; done
