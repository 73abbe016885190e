#!/usr/bin/env bash
# Starts xorl-dist on many ranks with the MPI on PATH (Open MPI or MPICH), and passes signals on so that a run saves.
#
#   launch/mpirun.sh -n 8 --config run.yaml [--section.field value]...
#   launch/mpirun.sh -n 16 --hosts hosts.txt --config run.yaml       hosts.txt: a host a line, as mpirun reads it
#
#   -n N             ranks; as many as this machine has cores when left out
#   --hosts FILE     hosts to start them on
#   --dry-run        prints the command instead
#
# Each rank gets cores ÷ ranks of a host as threads (OMP_NUM_THREADS, unless set) and is bound to them if there are
# enough. SIGTERM and SIGINT (Ctrl-C) mean save and stop: the ranks get SIGUSR1, and the code is 75 when they have
# saved. A second one ends them at once. XORL_DIST=FILE names the program; else the release build of this checkout, or
# xorl-dist on PATH.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$here/launch/lib.sh"

die() { echo "mpirun.sh: $*" >&2; exit 2; }
usage() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

ranks='' hosts='' dry=0
while [ $# -gt 0 ]; do
  case $1 in
    -n) ranks=${2:?-n needs a number}; shift 2 ;;
    --hosts) hosts=${2:?--hosts needs a file}; shift 2 ;;
    --dry-run) dry=1; shift ;;
    -h | --help) usage; exit 0 ;;
    *) break ;;
  esac
done
cores=$(nproc)
ranks=${ranks:-$cores}
[[ $ranks =~ ^[1-9][0-9]*$ ]] || die "-n $ranks: expected a number of ranks"
[ -z "$hosts" ] || [ -r "$hosts" ] || die "--hosts $hosts: cannot be read"
[ $# -gt 0 ] || die "nothing to run: give --config run.yaml"
command -v mpirun >/dev/null || die "mpirun is missing: launch/setup.sh installs one"

program=$(xorl_program "$here")

# --- threads and cores of a rank; with several hosts, of hosts that are like this one
here_ranks=$ranks
if [ -n "$hosts" ]; then
  count=$(grep -cv '^[[:space:]]*\(#.*\)\?$' "$hosts" || true)
  [ "$count" -gt 0 ] || die "--hosts $hosts: no host in it"
  here_ranks=$(((ranks + count - 1) / count))
fi
threads=$((cores / here_ranks)) fits=1
if [ "$threads" = 0 ]; then threads=1 fits=0; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
[ $((OMP_NUM_THREADS * here_ranks)) -le "$cores" ] || fits=0

launch=(mpirun -n "$ranks")
if mpirun --version 2>&1 | grep -q 'Open MPI\|OpenRTE'; then
  [ "$(id -u)" != 0 ] || launch+=(--allow-run-as-root)
  # Neighbours on one host: they exchange the most.
  [ -z "$hosts" ] || launch+=(--hostfile "$hosts" --map-by "ppr:$here_ranks:node")
  if [ $fits = 1 ] && [ -z "$hosts" ]; then
    launch+=(--map-by "slot:PE=$OMP_NUM_THREADS" --bind-to core)
  elif [ $fits = 0 ]; then
    launch+=(--oversubscribe --bind-to none)
  fi
  # Other hosts get only the variables that are named.
  for name in $(compgen -e | grep -E '^(OMP_|XORL_|RUST_LOG$|LD_LIBRARY_PATH$|HF_|NCCL_|CUDA_)'); do
    launch+=(-x "$name")
  done
else
  # Hydra: all variables go along, and more ranks than cores are allowed.
  [ -z "$hosts" ] || launch+=(-f "$hosts" -ppn "$here_ranks")
  [ $fits = 0 ] || launch+=(-bind-to "core:$OMP_NUM_THREADS")
fi
launch+=("$program" "$@")
if [ $dry = 1 ]; then
  printf '%q ' "${launch[@]}"
  echo
  exit 0
fi

# --- signals: mpirun in a process group of its own, or Ctrl-C would reach it too, which makes it kill the ranks
set -m
"${launch[@]}" </dev/null &
pid=$!
set +m
asked=0
stop() {
  asked=$((asked + 1))
  if [ $asked = 1 ]; then
    echo "mpirun.sh: SIG$1: the ranks save and stop; once more ends them at once" >&2
    kill -USR1 "$pid" 2>/dev/null || true
  else
    kill -TERM "$pid" 2>/dev/null || true
  fi
}
trap 'stop TERM' TERM
trap 'stop INT' INT
trap 'kill -USR1 "$pid" 2>/dev/null || true' USR1

wait_through_signals "$pid"
