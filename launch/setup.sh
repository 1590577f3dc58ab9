# shellcheck shell=bash
# Makes a virtual environment and installs the package into it; sourced by demo.sh and test.sh.
# usage: setup_environment FOLDER PYTHON EXTRAS [MEGATRON_VERSION]

TORCH_VERSION=2.13.0

# The first of these that is a Python the package runs on.
find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.12 python3.11 python3.10; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null; then
      command -v "$candidate"
      return 0
    fi
  done
  echo "Python 3.10, 3.11 or 3.12 is needed, none was found; install 3.12 beside it, for example: pyenv install 3.12, or: uv python install 3.12; then set PYTHON to it" >&2
  return 2
}

# Debian and Ubuntu ship python3 without venv: installed as root, else the command is named.
ensure_venv_module() {
  local python=$1 package
  "$python" -c 'import ensurepip, venv' 2>/dev/null && return 0
  package="python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -y -qq --no-install-recommends "$package" >/dev/null && return 0
  fi
  echo "$python has no venv module; install it with: sudo apt-get install $package" >&2
  return 2
}

gpu_count() { nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true; }

# A machine with a GPU gets torch's CUDA build, every other one the CPU build where pip finds one: the CUDA build
# runs on a CPU too, but brings gigabytes. PIP_EXTRA_INDEX_URL may name PyTorch's index of CPU builds.
install_torch() {
  local pip=$1 log=$2
  if [ "$(gpu_count)" = 0 ]; then
    "$pip" install -q "torch==$TORCH_VERSION+cpu" >>"$log" 2>&1 && return 0
    echo "no CPU build of torch $TORCH_VERSION at hand: installing the CUDA build, which runs on a CPU as well"
  fi
  "$pip" install -q "torch==$TORCH_VERSION" >>"$log" 2>&1
}

# The packages into an environment; what pip says goes into its install.log.
install_packages() {
  local folder=$1 extras=$2 lock=$3 megatron=$4 constraints=()
  export PIP_DISABLE_PIP_VERSION_CHECK=1
  [ -f "$lock" ] && constraints=(-c "$lock")
  "$folder/bin/pip" install -q --upgrade pip >"$folder/install.log" 2>&1 &&
    install_torch "$folder/bin/pip" "$folder/install.log" &&
    "$folder/bin/pip" install -q "${constraints[@]}" ${megatron:+"megatron-core==$megatron"} -e ".[$extras]" >>"$folder/install.log" 2>&1
}

setup_environment() {
  local folder=$1 python=$2 extras=$3 megatron=${4:-} stamp wanted lock
  lock=requirements/py$("$python" -c 'import sys; print("%d%d" % sys.version_info[:2])').txt
  wanted=$({ cat setup.py launch/setup.sh; [ "$(gpu_count)" = 0 ] || echo gpu; cat "$lock" 2>/dev/null || true; } | sha256sum | cut -c1-16)-$extras-$megatron
  stamp=$folder/.installed
  [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return 0
  ensure_venv_module "$python" || return
  echo "installing into $folder (a few minutes the first time)"
  "$python" -m venv "$folder"
  if ! install_packages "$folder" "$extras" "$lock" "$megatron"; then
    tail -n 20 "$folder/install.log" >&2
    echo "the installation failed: $folder/install.log says why" >&2
    return 1
  fi
  echo "$wanted" >"$stamp"
}

# A Python 3.12 on the PATH or under pyenv: megatron-core from 0.17 on needs it.
newest_python() {
  local candidate
  for candidate in python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python3.12; do
    "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null || continue
    command -v "$candidate"
    return 0
  done
  return 1
}
