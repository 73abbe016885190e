# shellcheck shell=bash
# Functions that the batch scripts source, in the root of the checkout. Not a program.
#
# A job's run is slurm-JOB (or slurm-JOB_TASK) in OUT (outputs/slurm-JOB): checkpoints, metrics, and slurm.log, the
# output of its ranks. A requeued job keeps its number, so it finds its newest whole step and continues by itself; a
# server finds its adapters.

. launch/lib.sh

# The job's name.
xorl_job() {
  local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
  echo "slurm-${job:-$SLURM_JOB_ID}"
}

# xorl_run srun|mpirun CONFIG [--section.field VALUE]...
xorl_run() {
  local launcher=$1 config=$2 job
  shift 2
  job=$(xorl_job)
  local out=${OUT:-outputs/$job}
  xorl_start "$launcher" "$out" --config "$config" --train.output_dir "$out" --train.run_id "$job" \
    --train.load_checkpoint_path auto --train.log_format structured "$@"
}

# xorl_serve srun|mpirun CONFIG [--server.field VALUE]...
xorl_serve() {
  local launcher=$1 config=$2
  shift 2
  local out=${OUT:-outputs/$(xorl_job)}
  xorl_start "$launcher" "$out" serve --config "$config" --server.output_dir "$out" "$@"
}

# xorl_start srun|mpirun OUT ARGUMENT...
#
# Ends with the program's code. 75, saved and stopped: when slurm's warning (SIGUSR1) was the reason, the job is
# requeued.
xorl_start() {
  local launcher=$1 out=$2 job program
  shift 2
  job=$(xorl_job)
  program=$(xorl_program "$PWD")
  mkdir -p "$out"
  export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
  local run=("$program" "$@")

  # In the background: bash acts on a signal only between commands, or while it waits.
  set -m
  case $launcher in
    # One dead task must not leave the others waiting; MPI starts over PMIx.
    srun) srun --mpi=pmix --kill-on-bad-exit=1 --output "$out/slurm.log" --open-mode=append "${run[@]}" & ;;
    mpirun) XORL_DIST=$program launch/mpirun.sh -n "$SLURM_NTASKS" "${run[@]:1}" >>"$out/slurm.log" 2>&1 & ;;
  esac
  local pid=$! warned=0 code
  set +m
  trap 'warned=1; echo "$job: SIGUSR1: saving, then requeued"; kill -USR1 $pid 2>/dev/null' USR1
  # Slurm sends it to the ranks too; one more would reach a srun that is ending, and end them.
  trap 'echo "$job: SIGTERM: the ranks save"' TERM
  wait_through_signals $pid && code=0 || code=$?
  trap - USR1 TERM
  echo "$job: ended with $code"
  if [ "$code" = 75 ] && [ $warned = 1 ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  return "$code"
}
