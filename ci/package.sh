#!/usr/bin/env bash
# Makes a release tarball: the program, launch scripts, configs, licence, README, completions and manual pages.
#
#   ci/package.sh [--out DIR] [--binary FILE]    DIR: target/package; FILE: the release build, which is made if left out
#
# libtorch (5 GB with CUDA) is not in it: bin/xorl-dist finds that of a venv, or the one that XORL_LIBTORCH names. The
# machine needs the MPI that the program was built for, and a glibc as new as here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() { echo "package.sh: $*" >&2; exit 2; }

target=${CARGO_TARGET_DIR:-target}
out='' binary=''
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=${2:?--out needs a folder}; shift 2 ;;
    --binary) binary=${2:?--binary needs a file}; shift 2 ;;
    *) die "$1: expected --out DIR or --binary FILE" ;;
  esac
done
out=${out:-$target/package}
if [ -z "$binary" ]; then
  cargo build --release --locked
  binary=$target/release/xorl-dist
fi
[ -x "$binary" ] || die "--binary $binary: no such program"

version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
name=xorl-dist-$version-$(uname -m)-linux
root=$out/$name
rm -rf "$root"
mkdir -p "$root"/{bin,libexec} "$root"/share/{bash-completion/completions,zsh/site-functions,fish/vendor_completions.d}

# Symbols stay for backtraces; line numbers take most of the space. The build id stays, too: ranks compare it.
strip --strip-debug -o "$root/libexec/xorl-dist" "$binary"
chmod 755 "$root/libexec/xorl-dist"
install -m 755 launch/program.sh "$root/bin/xorl-dist"
"$binary" completions bash >"$root/share/bash-completion/completions/xorl-dist"
"$binary" completions zsh >"$root/share/zsh/site-functions/_xorl-dist"
"$binary" completions fish >"$root/share/fish/vendor_completions.d/xorl-dist.fish"
"$binary" man --out "$root/share/man/man1"
cp README.md LICENSE "$root"
# What git does not know stays out, where there is git.
{ git ls-files -z launch configs 2>/dev/null || find launch configs -type f -print0; } | tar -c --null -T - | tar -x -C "$root"
rm -rf "$root"/launch/{setup.sh,quickstart,quickstart.sh}

# Equal files make an equal tarball.
tar -c --sort=name --owner=0 --group=0 --numeric-owner --mtime='2000-01-01 00:00Z' -C "$out" "$name" | gzip -n >"$out/$name.tar.gz"
echo "$out/$name.tar.gz"
