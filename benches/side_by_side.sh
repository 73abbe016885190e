#!/usr/bin/env bash
# The same LoRA training with PyTorch FSDP2 + PEFT (benches/peer_fsdp2_peft.py) and with xorl-dist, in turns on this
# machine.
#
#   benches/side_by_side.sh                                every case: a table each, benches/side_by_side.json and .svg
#   benches/side_by_side.sh --cases smollm2-2x512          the main case alone; in the JSON it takes its former place
#   benches/side_by_side.sh --losses 20                    20 losses of both, side by side
#   benches/side_by_side.sh --two-jobs                     2 ranks beside two jobs of 1 rank at once
#   benches/side_by_side.sh --start                        seconds from launch to the first step
#   benches/side_by_side.sh --help                         all options
#
# The peer is the fastest of its ways (recompute, malloc, torch.compile, 2 ranks or 2 threads), sought first; ours are
# held against the one that has as many cores. Hours for all cases on 2 cores; nothing else should run meanwhile. Every
# case is kept in the JSON as soon as it is measured.
#
# XORL_DIST=FILE takes that binary as it is: nothing is set up or built.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${XORL_DIST:-}" ]; then
  launch/setup.sh
  cargo build --release --quiet
  [ -d models/smollm2 ] || .venv/bin/python launch/quickstart/convert_smollm2.py models/smollm2
fi
export HF_HUB_OFFLINE=1
exec .venv/bin/python benches/side_by_side.py --binary "${XORL_DIST:-${CARGO_TARGET_DIR:-target}/release/xorl-dist}" "$@"
