#!/usr/bin/env bash
# What is too long for ci/test.sh, by name. Each prints one JSON line last.
#
#   ci/long.sh side_by_side    tokens/s, memory and losses beside PyTorch FSDP2 + PEFT, on SmolLM2
#   ci/long.sh quickstart      the quickstart, which ends with its score
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
  side_by_side) shift; exec benches/side_by_side.sh "$@" ;;
  quickstart) exec launch/quickstart.sh ;;
  *) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
