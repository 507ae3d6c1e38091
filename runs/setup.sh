#!/usr/bin/env bash
# Makes this checkout ready to run; the other scripts source it. Run again, it takes a second: each step leaves a stamp with
# a checksum of the files it depends on, and is done anew only when they have changed.
#
#   bash runs/setup.sh          what the pipeline needs       source runs/setup.sh dev    the test tools as well
#
#   NANOCHAT_PYTHON=PYTHON      install into that interpreter's environment, keeping its versions (default: make .venv)
#   NANOCHAT_TORCH=auto         cpu | cuda12 | default: which build of torch (auto: by the GPU and its driver)
#   NANOCHAT_BUILD=auto         cuda | cpu | none: what to compile of csrc/ (see setup.py)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\033[1;34m[setup]\033[0m %s\n' "$*" >&2; }
die() { printf '\033[1;31merror:\033[0m %s\n' "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# step NAME CHECKSUM COMMAND...: runs the command unless it succeeded before with the same checksum.
step() {
  local stamp="$ENVIRONMENT/.nanochat-$1" sum=$2
  shift 2
  [ "$(cat "$stamp" 2>/dev/null)" = "$sum" ] && return
  "$@"
  printf '%s' "$sum" >"$stamp"
}

checksum() { find "$@" -type f ! -path '*/target/*' ! -name '*.so' ! -name '*.pyc' -print0 2>/dev/null | LC_ALL=C sort -z | xargs -0 cat | cksum; }

find_python() {
  local name
  for name in python3 python3.12 python3.13 python3.11 python; do
    "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && echo "$name" && return
  done
  die "no Python 3.11 to 3.14 found: install one (Debian, Ubuntu: apt-get install python3-venv) or uv, which brings its own"
}

make_environment() {
  local python
  if [ -n "${NANOCHAT_PYTHON:-}" ]; then
    PYTHON=$NANOCHAT_PYTHON CONSTRAINTS=()
  else
    PYTHON=$PWD/.venv/bin/python CONSTRAINTS=(-c constraints.txt)
    if [ ! -x "$PYTHON" ]; then
      say "creating .venv"
      if have uv; then uv venv -q --python '>=3.11,<3.15' .venv
      else
        python=$(find_python)
        "$python" -m venv .venv || { rm -rf .venv; die "$python -m venv failed; Debian, Ubuntu: apt-get install python3-venv"; }
      fi
    fi
  fi
  ENVIRONMENT=$("$PYTHON" -c 'import sys; print(sys.prefix)') || die "NANOCHAT_PYTHON=$PYTHON does not run"
}

pip_install() {
  local quiet=-q
  [ -t 1 ] && [ "$1" = --show ] && quiet=
  [ "$1" = --show ] && shift
  if have uv; then uv pip install $quiet --python "$PYTHON" ${CONSTRAINTS[@]+"${CONSTRAINTS[@]}"} "$@"
  else "$PYTHON" -m pip install $quiet ${CONSTRAINTS[@]+"${CONSTRAINTS[@]}"} "$@"
  fi
}

# Prints the index to take torch from; nothing means the default one.
torch_index() {
  local choice=${NANOCHAT_TORCH:-auto} driver pytorch=https://download.pytorch.org/whl
  if [ "$choice" = auto ]; then
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d. -f1) || driver=""
    if [ -n "$driver" ]; then
      # the default build is for CUDA 13, which needs a driver of version 580
      if [ "$driver" -ge 580 ]; then choice=default; else choice=cuda12; fi
    elif [ "$(uname -s)" = Linux ] && have curl && curl -fsI --max-time 10 "$pytorch/cpu/torch/" >/dev/null 2>&1; then
      choice=cpu  # a machine without a GPU should not download CUDA
    else choice=default
    fi
  fi
  case $choice in
    cpu) echo "$pytorch/cpu" ;;
    cuda12) echo "$pytorch/cu128" ;;
    default) ;;
    *) die "NANOCHAT_TORCH=$choice is not one of auto, cpu, cuda12, default" ;;
  esac
}

# torch comes first and alone: what is built later is built against it, without an isolated second copy.
install_torch() {
  "$PYTHON" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null && return
  local index
  index=$(torch_index)
  say "installing torch from ${index:-the default package index} (the largest download, a few minutes)"
  pip_install --show 'torch>=2.11' 'numpy<2.4' ${index:+--index-url "$index"}
}

install_package() {
  say "installing nanochat"
  pip_install 'setuptools>=77,<82' wheel ninja pybind11 maturin
  have c++ || have g++ || have clang++ || say "no C++ compiler: building without extensions (the torch backends serve every op)"
  pip_install --no-build-isolation -e .
}

install_test_tools() {
  say "installing the test tools"
  pip_install --no-build-isolation -e '.[dev]'
}

install_tokenizer() {
  if ! have cargo; then
    have curl || die "the tokenizer needs Rust: install curl, or Rust itself from https://rustup.rs"
    say "installing Rust with its official installer"
    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y -q --profile minimal -c rustfmt -c clippy ||
      die "Rust could not be installed; install it from https://rustup.rs and run this again"
    PATH=$HOME/.cargo/bin:$PATH
  fi
  have cc || die "the tokenizer needs a C compiler to link with (Debian, Ubuntu: apt-get install build-essential; macOS: xcode-select --install)"
  say "building the tokenizer"
  pip_install --no-build-isolation --force-reinstall --no-deps ./rustbpe
}

[ -d "$HOME/.cargo/bin" ] && PATH=$PATH:$HOME/.cargo/bin
make_environment
bin=$(cd "$(dirname "$PYTHON")" && pwd)
export PATH=$bin:$PATH
step torch 1 install_torch
step package "$PWD $(checksum pyproject.toml setup.py constraints.txt csrc) ${NANOCHAT_BUILD:-auto}" install_package
step rustbpe "$(checksum rustbpe)" install_tokenizer
if [ "${1:-}" = dev ]; then step dev "$PWD $(checksum pyproject.toml constraints.txt)" install_test_tools; fi
