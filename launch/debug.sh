#!/usr/bin/env bash
# Runs three steps with --debug in one process, on the GPU if there is one. Every collective and the shapes and sizes
# of every layer are logged; the first value that is not finite ends it with the layer's number. The run's own output
# directory is not touched.
#
#   launch/debug.sh run.yaml [--section.field VALUE]...       3 steps; --train.max_steps says how many
#   RANKS=2 launch/debug.sh run.yaml                          on two ranks; weights are NaN after use
#
# XORL_DIST=FILE names the program; else the release build of this checkout, or xorl-dist on PATH.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$here/launch/lib.sh"
[ $# -gt 0 ] || { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2; exit 2; }
config=$1
shift
# cuBLAS gives the same bits each time only with this.
export CUBLAS_WORKSPACE_CONFIG=${CUBLAS_WORKSPACE_CONFIG:-:4096:8}
program=$(xorl_program "$here")
out=$(mktemp -d "${TMPDIR:-/tmp}/xorl-debug.XXXXXX")
echo "debug.sh: results go to $out" >&2
run=(--debug --config "$config" --train.output_dir "$out" --train.max_steps 3 --train.load_checkpoint_path null
  --train.log_format structured "$@")
if [ "${RANKS:-1}" = 1 ]; then exec "$program" "${run[@]}"; fi
XORL_DIST=$program exec "$here/launch/mpirun.sh" -n "$RANKS" "${run[@]}"
