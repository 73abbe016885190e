#!/usr/bin/env bash
# Builds the fuzz targets with AddressSanitizer and runs them: tests/fuzz/run.sh [TARGET...] [SECONDS]
# New inputs and findings go to target/fuzz/TARGET and target/fuzz/found; the corpus itself is left alone. The last line
# of each target has its executions. XORL_FUZZ_NO_BUILD=1 runs what is built.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

seconds=600 targets=()
for argument in "$@"; do
  case $argument in *[!0-9]*) targets+=("$argument") ;; *) seconds=$argument ;; esac
done
[ ${#targets[@]} -gt 0 ] || mapfile -t targets < <(ls tests/fuzz/corpus)

build=${XORL_FUZZ_BUILD:-target/fuzz/build}
if [ -z "${XORL_FUZZ_NO_BUILD:-}" ]; then
  launch/setup.sh --build-only
  # The program's own versions of crates.
  cp Cargo.lock tests/fuzz/Cargo.lock
  flags=(-Cpasses=sancov-module -Zsanitizer=address)
  for flag in level=4 inline-8bit-counters pc-table trace-compares; do flags+=("-Cllvm-args=-sanitizer-coverage-$flag"); done
  # The sanitizer comes with the stable compiler, its flag does not.
  RUSTC_BOOTSTRAP=1 RUSTFLAGS="${flags[*]}" CARGO_INCREMENTAL=0 cargo build --quiet --release \
    --manifest-path tests/fuzz/Cargo.toml --target x86_64-unknown-linux-gnu --target-dir "$build"
fi

# libtorch is not instrumented: leaks and double definitions in it are none of ours.
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:detect_container_overflow=0:allocator_may_return_null=1
libtorch=${LIBTORCH:-.venv/torch}
export OMP_NUM_THREADS=1 LD_LIBRARY_PATH=$libtorch/lib
found=0
for target in "${targets[@]}"; do
  mkdir -p "target/fuzz/$target" target/fuzz/found
  echo "== $target, $seconds s"
  XORL_FUZZ_TARGET=$target nice "$build/x86_64-unknown-linux-gnu/release/any" \
    -max_total_time="$seconds" -timeout=60 -rss_limit_mb=4096 -max_len=65536 -print_final_stats=1 -verbosity=0 \
    -dict=tests/fuzz/words.dict -artifact_prefix="target/fuzz/found/$target-" \
    "target/fuzz/$target" "tests/fuzz/corpus/$target" 2>"target/fuzz/$target.log" || found=1
  grep -E '^stat::number_of_executed_units|^stat::peak_rss|ERROR|SUMMARY|panicked|Test unit written' "target/fuzz/$target.log" || true
done
exit $found
