#!/usr/bin/env bash
# Two hosts on this machine: network namespaces with an address each, joined by a cable. As root; for tests with Open
# MPI.
#
#   two.sh up NAME             hosts NAME-a (10.77.0.1) and NAME-b (10.77.0.2)
#   two.sh run NAME N COMMAND... N ranks of COMMAND on each, started on the first
#   two.sh carried NAME        bytes that have come to the first over the cable
#   two.sh cut NAME            pulls the cable
#   two.sh down NAME
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
command=$1 name=$2
shift 2
case $command in
  up)
    for host in a b; do
      ip netns add "$name-$host"
      ip -n "$name-$host" link set lo up
    done
    ip link add "$name-va" type veth peer name "$name-vb"
    number=0
    for host in a b; do
      number=$((number + 1))
      ip link set "$name-v$host" netns "$name-$host"
      ip -n "$name-$host" addr add "10.77.0.$number/24" dev "$name-v$host"
      ip -n "$name-$host" link set "$name-v$host" up
    done
    ;;
  agent) # ADDRESS COMMAND...: what mpirun takes for ssh
    case $1 in 10.77.0.1) host=a ;; *) host=b ;; esac
    shift
    exec ip netns exec "$name-$host" unshare --uts bash -c "hostname host-$host; $*"
    ;;
  run)
    each=$1
    shift
    folder=$(mktemp -d)
    printf "10.77.0.%s slots=$each\n" 1 2 >"$folder/hosts"
    printf '#!/bin/bash\nexec %q agent %q "$@"\n' "$(realpath "$0")" "$name" >"$folder/agent"
    chmod +x "$folder/agent"
    network=(--mca btl_tcp_if_include 10.77.0.0/24 --mca oob_tcp_if_include 10.77.0.0/24 --mca plm_rsh_agent "$folder/agent")
    exec ip netns exec "$name-a" unshare --uts bash -c 'hostname host-a; exec "$@"' -- \
      mpirun --allow-run-as-root --hostfile "$folder/hosts" --map-by "ppr:$each:node" --oversubscribe -n $((2 * each)) "${network[@]}" -x OMP_NUM_THREADS "$@"
    ;;
  carried) ip -n "$name-a" -s link show "$name-va" | awk '/RX:/ {getline; print $1}' ;;
  cut) ip -n "$name-b" link set "$name-vb" down ;;
  down)
    # Whoever still waits for the other host goes with it.
    for host in a b; do
      ip netns pids "$name-$host" 2>/dev/null | xargs -r kill -9 2>/dev/null || true
      ip netns del "$name-$host" 2>/dev/null || true
    done
    ;;
esac
