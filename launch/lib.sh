# shellcheck shell=bash
# Functions that the scripts of this folder source. Not a program.

# Prints the program: XORL_DIST, the release build of the checkout $1, that of the release tarball $1, or xorl-dist on
# PATH.
xorl_program() {
  local own=${CARGO_TARGET_DIR:-$1/target}/release/xorl-dist
  if [ -n "${XORL_DIST:-}" ]; then
    echo "$XORL_DIST"
  elif [ -x "$own" ]; then
    echo "$own"
  elif [ -x "$1/bin/xorl-dist" ]; then
    echo "$1/bin/xorl-dist"
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

# Has shells complete xorl-dist, for those whose folders are below HOME, and puts its manual pages there. The scripts
# ask the program on PATH, so that they are those of every later build. $1: the program, perhaps not yet built.
install_completions() {
  local data=${XDG_DATA_HOME:-$HOME/.local/share} config=${XDG_CONFIG_HOME:-$HOME/.config}
  local is='command -v xorl-dist >/dev/null'
  write_once "$data" bash-completion/completions/xorl-dist "$is && eval \"\$(xorl-dist completions bash)\""
  write_once "$data/zsh" site-functions/_xorl-dist "#compdef xorl-dist
$is && eval \"\$(xorl-dist completions zsh)\""
  write_once "$config/fish" completions/xorl-dist.fish "$is; and xorl-dist completions fish | source"
  [ ! -x "$1" ] || [ ! -d "$data" ] || "$1" man --out "$data/man/man1" 2>/dev/null || true
}

# write_once FOLDER FILE TEXT: where there is such a folder, and unless the file has the text.
write_once() {
  if [ -d "$1" ] && [ "$(cat "$1/$2" 2>/dev/null)" != "$3" ]; then
    mkdir -p "$(dirname "$1/$2")"
    printf '%s\n' "$3" >"$1/$2"
  fi
}
