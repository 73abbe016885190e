# shellcheck shell=bash
# Functions that the scripts of this folder source. Not a program.

# Prints the program: XORL_DIST, the release build of the checkout $1, or xorl-dist on PATH.
xorl_program() {
  local own=${CARGO_TARGET_DIR:-$1/target}/release/xorl-dist
  if [ -n "${XORL_DIST:-}" ]; then
    echo "$XORL_DIST"
  elif [ -x "$own" ]; then
    echo "$own"
  else
    command -v xorl-dist || { echo "${0##*/}: no xorl-dist: cargo build --release, or XORL_DIST=FILE" >&2; return 2; }
  fi
}

# Waits for the process $1 through all signals, whose traps run meanwhile, and ends with its code.
wait_through_signals() {
  local code=0 last
  while :; do
    wait "$1" && code=0 || code=$?
    # A signal ends the wait, not the process.
    kill -0 "$1" 2>/dev/null || break
  done
  # What came together with a signal was the signal's number.
  if wait "$1" 2>/dev/null; then
    code=0
  else
    last=$?
    [ $last = 127 ] || code=$last
  fi
  return "$code"
}
