#!/usr/bin/env bash
# Starts a server for clients that train and sample adapters. Passes signals on, so that it saves all adapters.
#
#   launch/serve.sh -n 2 server.yaml [--server.field VALUE]...
#   launch/serve.sh -n 16 --hosts hosts.txt server.yaml
#
# Options before the file are those of mpirun.sh. The line `listening on http://ADDRESS` says that it takes requests.
# SIGTERM and SIGINT (Ctrl-C): requests that were taken are finished, all adapters are saved, the code is 75, and the
# same command brings them back. A second one ends the server at once. XORL_DIST=FILE names the program; else the
# release build of this checkout, or xorl-dist on PATH.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

options=()
while [ $# -gt 0 ]; do
  case $1 in
    -n | --hosts) options+=("$1" "${2:?$1 needs a value}"); shift 2 ;;
    --dry-run) options+=("$1"); shift ;;
    -h | --help) usage; exit 0 ;;
    *) break ;;
  esac
done
[ $# -gt 0 ] || { usage >&2; exit 2; }
config=$1
shift
exec "$here/launch/mpirun.sh" "${options[@]}" serve --config "$config" "$@"
