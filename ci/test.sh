#!/usr/bin/env bash
# Sets up and passes every check and every test. Run from anywhere; needs no GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
launch/setup.sh
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
cargo fmt --check
cargo clippy --all-targets -- -D warnings
RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --quiet
if cargo nextest --version >/dev/null 2>&1; then
  cargo nextest run
else
  cargo test
fi
