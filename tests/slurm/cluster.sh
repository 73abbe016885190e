#!/usr/bin/env bash
# A slurm cluster of this one machine, in a folder of its own, for tests. As root; needs slurm-wlm and munge.
#
#   cluster.sh start DIR      then SLURM_CONF=DIR/slurm.conf makes sbatch, srun and scontrol speak to it
#   cluster.sh stop DIR
set -euo pipefail
command=$1 dir=$2
PATH=$PATH:/usr/sbin
case $command in
  start)
    mkdir -p "$dir"/{munge,state,spool,tmp}
    chmod 755 "$dir"
    chmod 700 "$dir/munge"
    # The socket has to be reachable for everybody, its folder too.
    mkdir -p "$dir/socket"
    chmod 755 "$dir/socket"
    dd if=/dev/urandom of="$dir/munge/key" bs=128 count=1 status=none
    chmod 400 "$dir/munge/key"
    munged --force --key-file "$dir/munge/key" --socket "$dir/socket/munge" --pid-file "$dir/munge/pid" \
      --log-file "$dir/munge/log" --seed-file "$dir/munge/seed"
    host=$(hostname -s)
    read -r controller node < <(python3 -c '
import socket
sockets = [socket.socket() for _ in range(2)]
for s in sockets: s.bind(("", 0))
print(*(s.getsockname()[1] for s in sockets))')
    cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=$controller
SlurmdPort=$node
AuthType=auth/munge
# A requeued job waits for as long as a credential lives.
AuthInfo=socket=$dir/socket/munge,cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
# Folders of steps go by the job's number: what a killed cluster has left in /tmp would stop a step of this one.
TmpFS=$dir/tmp
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=30
# More CPUs than there may be: nothing here is timed.
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
# Else a requeued job waits for up to a minute.
SchedulerParameters=sched_interval=1,batch_sched_delay=0
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
    export SLURM_CONF=$dir/slurm.conf
    slurmctld
    slurmd
    for _ in $(seq 100); do
      sinfo -h -o %T 2>/dev/null | grep -q idle && exit 0
      sleep 0.2
    done
    echo "the cluster did not come up:" >&2
    tail -n 20 "$dir"/slurmctld.log "$dir"/slurmd.log >&2
    exit 1
    ;;
  stop)
    for file in slurmd.pid slurmctld.pid munge/pid; do
      pid=$(cat "$dir/$file" 2>/dev/null || true)
      [ -z "$pid" ] || kill "$pid" 2>/dev/null || true
    done
    ;;
esac
