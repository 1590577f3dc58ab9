#!/usr/bin/env bash
# Set-up, static checks and tests. --all adds the slow tiers: tests marked slow, and the newest supported megatron-core
# under Python 3.12 where one is found.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup.sh
all=no
[ "${1:-}" = --all ] && all=yes && shift

# two cores are shared by the tests' processes: threads that spin while they wait would only slow each other down
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 HF_HUB_OFFLINE=1

python=$(find_python)
setup_environment .venv "$python" dev,export
.venv/bin/ruff check minitron_megatron tests launch benchmarks docker setup.py
.venv/bin/ruff format --check minitron_megatron tests launch benchmarks docker setup.py
.venv/bin/mypy minitron_megatron

# For tests/docker, where it can be had: as root on Debian. Without it those tests say why they are skipped.
install_buildah() {
  local program missing=no
  for program in buildah mmdebstrap shellcheck; do command -v $program >/dev/null || missing=yes; done
  [ $missing = no ] && return 0
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 0
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends buildah mmdebstrap shellcheck >/dev/null ||
    echo "buildah could not be installed: tests/docker are skipped" >&2
}

if [ $all = no ]; then
  exec .venv/bin/pytest -m "not slow" "$@"
fi
install_buildah
.venv/bin/pytest "$@"

newest=$(newest_python || true)
if [ -z "$newest" ]; then
  echo "no Python 3.12 found: megatron-core 0.19.2 is not tested (it needs 3.12; pyenv or apt have one)"
  exit 0
fi
setup_environment .venv-newest "$newest" dev,export 0.19.2
.venv-newest/bin/pytest -m "not slow" tests/unit tests/distributed
