#!/usr/bin/env bash
# The same LoRA training with PyTorch FSDP2 + PEFT and with xorl-dist, in turns on this machine: tokens/s, memory, losses.
#
#   benches/side_by_side.sh [options of side_by_side.py, e.g. --steps 10 --repeats 3]
#
# Prints a table and, last, one line of JSON. About 10 minutes on 2 cores; nothing else should run meanwhile.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
launch/setup.sh
cargo build --release --quiet
[ -d models/smollm2 ] || .venv/bin/python launch/quickstart/convert_smollm2.py models/smollm2
export HF_HUB_OFFLINE=1
exec .venv/bin/python benches/side_by_side.py --binary "${CARGO_TARGET_DIR:-target}/release/xorl-dist" "$@"
