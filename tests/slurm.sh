#!/usr/bin/env bash
# The smoke DAG through a real Slurm of one node: bash tests/slurm.sh [TARGET]
# As root on Debian; installs slurm-wlm and munge, writes /etc/slurm/slurm.conf, and stops both when
# it ends. One training is killed while it runs: Slurm tells Snakemake, which runs it again. The
# checkout is a copy in a folder with a space in its name. Not part of `make test`.
set -euo pipefail
cd "$(dirname "$0")/.."
source_dir=$PWD
target=${1:-results/tables/conv_shrink.md}
state=$(mktemp -d)
[ -x .venv/bin/snakemake ] || { echo "error: no .venv here: run make setup first" >&2; exit 1; }
[ "$(id -u)" = 0 ] || { echo "error: tests/slurm.sh installs and starts Slurm: run it as root" >&2; exit 1; }
[ ! -e /etc/slurm/slurm.conf ] || grep -q "^ClusterName=hovit$" /etc/slurm/slurm.conf ||
    { echo "error: /etc/slurm/slurm.conf is of another cluster: run this on a machine without Slurm" >&2; exit 1; }
command -v slurmctld >/dev/null && command -v munged >/dev/null ||
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge; } >"$state/apt.log"

stop() {
    pkill -x slurmd || true
    pkill -x slurmctld || true
    pkill -x munged || true
    sleep 2 # until they have written what they write at their end
    rm -rf /etc/slurm/slurm.conf "$state"
}
trap stop EXIT

mkdir -p /etc/slurm /run/munge "$state/ctld" "$state/d"
cat >/etc/slurm/slurm.conf <<CONF
ClusterName=hovit
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
StateSaveLocation=$state/ctld
SlurmdSpoolDir=$state/d
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
NodeName=localhost CPUs=$(nproc) RealMemory=$(awk '/MemTotal/ {print int($2 / 1200)}' /proc/meminfo) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=1440 State=UP
CONF
chown munge: /run/munge
pgrep -x munged >/dev/null || runuser -u munge -- munged
slurmctld -D >"$state/ctld.log" 2>&1 &
slurmd -D >"$state/d.log" 2>&1 &
for _ in $(seq 30); do sinfo -h -o %t 2>/dev/null | grep -q idle && break; sleep 1; done
sinfo

checkout="$state/a folder/hovit copy"
mkdir -p "$checkout"
git ls-files -coz --exclude-standard | xargs -0 cp --parents -t "$checkout"
cd "$checkout"
sed -i 's/^set-resources:/&\n  - train:gpu=0\n  - measure:gpu=0\n  - analyse:gpu=0/' profiles/slurm/config.yaml
export PYTHONPATH="$checkout/src" PATH="$source_dir/.venv/bin:$PATH"
snakemake "$target" --workflow-profile profiles/slurm --jobs 4 --latency-wait 5 \
    --slurm-no-account --slurm-status-command squeue \
    --default-resources slurm_partition=main mem_mb=2000 runtime=30 >"$state/snakemake.log" 2>&1 &
run=$!

killed=
while kill -0 $run 2>/dev/null; do
    if [ -z "$killed" ]; then
        training=$(pgrep -f "hovit train .* --scale smoke" | tail -1 || true)
        job=$(squeue -h -t R -o "%i %k" | awk '/rule_train/ {print $1; exit}')
        if [ -n "$job" ] && [ -n "$training" ]; then
            scancel --signal=KILL --full "$job" && killed=$job && echo "killed Slurm's job $killed, a training, while it ran"
        fi
    fi
    sleep 1
done
wait $run || { tail -40 "$state/snakemake.log"; echo "error: the DAG failed" >&2; exit 1; }
tail -3 "$state/snakemake.log"
[ -n "$killed" ] || { echo "error: no job was killed: nothing is shown of retries" >&2; exit 1; }
grep -q "Trying to restart job" "$state/snakemake.log" || { echo "error: the killed job was not run again" >&2; exit 1; }
cat "$target"
snakemake -n "$target" --cores 1 2>&1 | grep -q "Nothing to be done" || { echo "error: something is left to do" >&2; exit 1; }
echo "ok: $(grep -c 'has been submitted with SLURM jobid' "$state/snakemake.log") jobs through Slurm, one of them killed and run again"
