#!/usr/bin/env bash
# Installs what building and testing need: an MPI, libclang, and a venv with torch. Idempotent, and done in an
# instant when there is nothing to do.
#
#   launch/setup.sh             everything
#   launch/setup.sh --no-tests  without the Python packages that only tests need
#
# Brings its own where you do not: an activated venv with torch 2.13.0, LIBTORCH=/path, or an mpicc on PATH
# (Open MPI or MPICH) are used as they are.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH=2.13.0
tests=1
[ "${1:-}" = --no-tests ] && tests=0

die() { echo "setup: $*" >&2; exit 1; }

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif sudo -n true 2>/dev/null; then sudo -n "$@"
  else return 1; fi
}

command -v cargo >/dev/null || die "cargo is missing: install Rust 1.95 or newer (https://rustup.rs)"

# --- MPI, and libclang for the generated MPI bindings
packages=()
command -v mpicc >/dev/null || packages+=(openmpi-bin libopenmpi-dev)
ls /usr/lib/llvm-*/lib/libclang*.so* /usr/lib/*/libclang*.so* >/dev/null 2>&1 || [ -n "${LIBCLANG_PATH:-}" ] || packages+=(libclang-dev)
command -v cc >/dev/null || packages+=(build-essential)
if [ ${#packages[@]} -gt 0 ]; then
  command -v apt-get >/dev/null || die "please install by hand: ${packages[*]} (no apt-get here)"
  echo "setup: apt-get install ${packages[*]}"
  { as_root apt-get update -qq && as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${packages[@]}" >/dev/null; } ||
    die "could not install ${packages[*]}: run this script as root once, or install them by hand"
fi

# --- libtorch: .venv/torch is where .cargo/config.toml looks
torch_dir() { "$1" -c 'import importlib.util as u, os; s = u.find_spec("torch"); print(os.path.dirname(s.origin) if s else "")' 2>/dev/null || true; }
torch_ok() { [ -n "$1" ] && [ -f "$1/version.py" ] && grep -q "'$TORCH" "$1/version.py"; }

if [ -n "${LIBTORCH:-}" ]; then
  echo "setup: using LIBTORCH=$LIBTORCH"
elif ! { [ -e .venv/torch ] && torch_ok "$(readlink -f .venv/torch)"; }; then
  own=""
  [ -n "${VIRTUAL_ENV:-}" ] && own=$(torch_dir "$VIRTUAL_ENV/bin/python")
  if torch_ok "$own"; then
    mkdir -p .venv
    ln -sfn "$own" .venv/torch
  else
    if [ ! -x .venv/bin/pip ]; then
      python3 -m venv .venv 2>/dev/null || { as_root apt-get install -y -qq python3-venv >/dev/null && python3 -m venv .venv; } ||
        die "python3 with venv is missing"
    fi
    echo "setup: installing torch $TORCH into .venv (about a minute, 5 GB)"
    .venv/bin/pip install -q "torch==$TORCH"
    ln -sfn "$(torch_dir .venv/bin/python)" .venv/torch
  fi
fi

# --- what the oracles of the tests import
if [ $tests = 1 ]; then
  want=$(sha256sum tests/oracle/requirements.txt | cut -d' ' -f1)
  if [ "$(cat .venv/.oracle 2>/dev/null || true)" != "$want" ]; then
    [ -x .venv/bin/pip ] || python3 -m venv .venv
    echo "setup: installing tests/oracle/requirements.txt into .venv"
    .venv/bin/pip install -q -r tests/oracle/requirements.txt
    echo "$want" > .venv/.oracle
  fi
fi
