#!/usr/bin/env bash
# Set-up, static checks and tests. --all adds the slow tiers: tests marked slow, those of a SLURM cluster of two nodes and of the Dockerfile
# among them (apt installs what they need), and, where a Python 3.12 is found, the newest supported megatron-core under the tests that call it.
# Further arguments go to pytest, which is then called once.
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

# install_programs TESTS "PROGRAM…" PACKAGE…: by apt, as root on Debian and Ubuntu. Where they cannot be had those tests say why they are skipped.
install_programs() {
  local tests=$1 programs=$2 program missing=no
  shift 2
  for program in $programs; do command -v "$program" >/dev/null || missing=yes; done
  [ $missing = no ] && return 0
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 0
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null ||
    echo "$* could not be installed: $tests are skipped" >&2
}

# run_tests ENVIRONMENT TIER WHAT…: unit tests on two processes, then what else, which starts processes of its own; both before a failure counts.
run_tests() {
  local pytest=$1/bin/pytest tier=$2 code=0
  shift 2
  "$pytest" -n 2 -m "$tier" tests/unit || code=$?
  "$pytest" -m "$tier" "$@" || code=$?
  return $code
}

tier="not slow"
if [ $all = yes ]; then
  tier=
  install_programs tests/slurm "slurmctld slurmd munged shellcheck" slurm-wlm munge shellcheck
  install_programs tests/docker "buildah mmdebstrap shellcheck" buildah mmdebstrap shellcheck
fi
[ $# -eq 0 ] || exec .venv/bin/pytest -m "$tier" "$@"
run_tests .venv "$tier" --ignore=tests/unit tests
[ $all = yes ] || exit 0

newest=$(newest_python || true)
if [ -z "$newest" ]; then
  echo "no Python 3.12 found: megatron-core 0.19.2 is not tested (it needs 3.12; pyenv or apt have one)"
  exit 0
fi
setup_environment .venv-newest "$newest" dev,export 0.19.2
newest_tests=()
# those that call megatron-core most: models, schedules, optimizers, checkpoints, generation
for what in checkpoints context_parallel experts first_step fp8_emulation generate; do
  newest_tests+=("tests/distributed/test_$what.py")
done
run_tests .venv-newest "not slow" "${newest_tests[@]}"
