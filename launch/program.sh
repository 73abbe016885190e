#!/usr/bin/env bash
# Starts the program of a release tarball with the libtorch of this machine. `bin/xorl-dist` is this script.
#
# Takes the first of: XORL_LIBTORCH (a folder with libtorch_cpu.so, or one whose lib/ has it), an activated venv's
# torch, that of .venv beside the tarball's folders, the torch that python3 would import. It has to be version 2.13.0.
set -euo pipefail

TORCH=2.13.0
here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)

die() { echo "error: $*" >&2; exit 2; }

# Prints the folder of the libraries of the torch in $1, if it has them.
libraries() {
  local folder
  for folder in "$1" "$1/lib"; do
    [ ! -e "$folder/libtorch_cpu.so" ] || { realpath "$folder"; return; }
  done
}
# Prints the same of the torch that the interpreter $1 would import, without importing it.
of_python() {
  local torch
  torch=$("$1" -c 'import importlib.util as u, os; s = u.find_spec("torch"); print(os.path.dirname(s.origin) if s else "")' 2>/dev/null) || return 0
  [ -z "$torch" ] || libraries "$torch"
}

if [ -n "${XORL_LIBTORCH:-}" ]; then
  found=$(libraries "$XORL_LIBTORCH")
  [ -n "$found" ] || die "XORL_LIBTORCH=$XORL_LIBTORCH has no libtorch_cpu.so: name the folder of libtorch $TORCH, such as VENV/lib/python3.11/site-packages/torch"
else
  found=''
  for python in ${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin/python"} "$here/.venv/bin/python" python3; do
    [ -n "$found" ] || found=$(of_python "$python")
  done
  [ -n "$found" ] || die "no libtorch: pip install torch==$TORCH into a venv and activate it, or set XORL_LIBTORCH to the folder of libtorch $TORCH"
fi
version=$(sed -n "s/^__version__ = '\([0-9.]*\).*/\1/p" "$found/../version.py" 2>/dev/null || sed 's/+.*//' "$found/../build-version" 2>/dev/null || true)
[ -z "$version" ] || [ "$version" = "$TORCH" ] || die "$found is of torch $version: this program needs $TORCH"

# NCCL lies beside torch, as libnccl.so.2 alone; it is looked for as libnccl.so.
nccl=$(realpath -m "$found/../../nvidia/nccl/lib")
links=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/xorl-dist/lib
if [ -e "$nccl/libnccl.so.2" ] && [ ! -e "$nccl/libnccl.so" ]; then
  { mkdir -p "$links" && ln -sfn "$nccl/libnccl.so.2" "$links/libnccl.so"; } 2>/dev/null || true
fi
export LD_LIBRARY_PATH=$found:$nccl:$links${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
exec "$here/libexec/xorl-dist" "$@"
