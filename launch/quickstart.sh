#!/usr/bin/env bash
# From a fresh clone to a trained adapter of a real model: SmolLM2-135M-Instruct, its base sharded over 2 CPU ranks,
# learns to turn an order in English into JSON. Shows two answers before and after; the last line is JSON with the
# score.
#
#   launch/quickstart.sh
#
# Leaves models/smollm2 (the converted model) and outputs/quickstart (checkpoints, metrics, predictions).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL=models/smollm2
OUT=outputs/quickstart
HELDOUT=launch/quickstart/data/heldout.jsonl

say() { printf '\n== %s [%d:%02d]\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

say 'Set up'
launch/setup.sh --no-tests

say 'Build'
build=${CARGO_TARGET_DIR:-target}
mkdir -p "$build"
echo "the first build takes several minutes; its log: $build/build.log"
cargo build --release >"$build/build.log" 2>&1 || { tail -n 30 "$build/build.log" >&2; exit 1; }
bin=$build/release/xorl-dist

if [ ! -d "$MODEL" ]; then
  say 'Convert the model'
  .venv/bin/python launch/quickstart/convert_smollm2.py "$MODEL"
fi

# Two ranks, a thread each, also where there are fewer than two cores.
launch=(mpirun -n 2)
if mpirun --version 2>&1 | grep -q 'Open MPI\|OpenRTE'; then
  launch+=(--oversubscribe)
  [ "$(id -u)" != 0 ] || launch+=(--allow-run-as-root)
fi
export OMP_NUM_THREADS=1
generate() { # OUT_FILE [ADAPTER_ARGUMENTS...]
  local file=$1
  shift
  "${launch[@]}" "$bin" generate --device cpu --model "$MODEL" "$@" --chat-file "$HELDOUT" --out "$file" --max-new-tokens 40
}

# A run from the start each time: what an earlier quickstart left would make the trainer refuse.
rm -rf "$OUT"
mkdir -p "$OUT"

say 'Answer the held-out orders before training'
generate "$OUT/before.jsonl"

say 'Train on 2 ranks'
"${launch[@]}" "$bin" --device cpu --config launch/quickstart/run.yaml

say 'Answer them after training'
generate "$OUT/after.jsonl" --adapter "$OUT/weights/run/$(<"$OUT/weights/run/latest")"

say 'Compare'
python3 launch/quickstart/score.py "$HELDOUT" "$OUT/before.jsonl" "$OUT/after.jsonl"
