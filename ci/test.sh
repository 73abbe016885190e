#!/usr/bin/env bash
# Sets up and passes every check and every test. Run from anywhere; needs no GPU. The last line counts the tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\n== %s [%d:%02d]\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

say 'Set up'
launch/setup.sh
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Incremental state, which no later build here reads, takes time and 2 GB.
export CARGO_INCREMENTAL=0
export XORL_ORACLE_PYTHON=${XORL_ORACLE_PYTHON:-$PWD/.venv/bin/python}
# Open MPI refuses root and more ranks than cores unless told; MPICH does not read these.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
# Two tests of ranks run at once: who waits leaves the core to the others.
export OMPI_MCA_mpi_yield_when_idle=1

say 'Format, lints, documentation'
cargo fmt --check
cargo clippy --all-targets --quiet -- -D warnings
git ls-files -z '*.sh' '*.sbatch' .ci/run | xargs -0 shellcheck -x
"$XORL_ORACLE_PYTHON" -m ruff check --quiet .
RUSTDOCFLAGS='-D warnings' cargo doc --no-deps --quiet

say 'Build'
cargo build --all-targets --quiet

say 'Quickstart model and data'
[ -d models/smollm2 ] || .venv/bin/python launch/quickstart/convert_smollm2.py models/smollm2
TQDM_DISABLE=1 TRANSFORMERS_VERBOSITY=error "$XORL_ORACLE_PYTHON" tests/oracle/check_smollm2.py models/smollm2

# The shipped data is what its script writes, which refuses held-out values that occur in training.
python3 launch/quickstart/make_data.py target/quickstart-data
diff -rq launch/quickstart/data target/quickstart-data

say 'Tests'
# rustdoc reads the whole library for them, and there may be none.
if grep -rqE '^ *//[/!] ```' src; then cargo test --doc --quiet; fi
cargo nextest run --profile ci
