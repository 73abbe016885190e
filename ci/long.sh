#!/usr/bin/env bash
# What is too long for ci/test.sh, by name. Each prints one JSON line last.
#
#   ci/long.sh side_by_side    tokens/s, memory and losses beside PyTorch FSDP2 + PEFT, on SmolLM2
#   ci/long.sh quickstart      the quickstart, which ends with its score
#   ci/long.sh real_size       one bf16 step of a random model with the shapes of Qwen2.5-1.5B, on 2 ranks
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
  side_by_side) shift; exec benches/side_by_side.sh "$@" ;;
  quickstart) exec launch/quickstart.sh ;;
  real_size)
    launch/setup.sh --no-tests
    cargo build --release --quiet
    rm -rf outputs/real_size
    export OMP_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    mpirun -n 2 "${CARGO_TARGET_DIR:-target}/release/xorl-dist" --config tests/fixtures/qwen2_1_5b/run.yaml
    cat outputs/real_size/metrics.jsonl
    ;;
  *) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
