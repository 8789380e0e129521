#!/usr/bin/env bash
# Run the smoke DAG through a real Slurm with one node: bash tests/slurm.sh [TARGET]
# Needs root on Debian; installs slurm-wlm and munge, and writes /etc/slurm/. The node claims two
# GPUs, so that profiles/slurm is used unchanged. The script kills one training while it runs: Slurm
# must run it again, and the result must be bit-identical to a run without Slurm. The checkout is a
# copy in a folder with a space and a quote in its name. At the end it is moved, and Snakemake must
# have nothing to do. All processes started here are stopped on exit. Not part of `make test`.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-results/tables/conv_shrink.md}
export PATH="$PWD/.venv/bin:$PATH"

fail() { echo "error: $*" >&2; exit 1; }
[ -x .venv/bin/snakemake ] || fail "no .venv here: run make setup first"
[ "$(id -u)" = 0 ] || fail "tests/slurm.sh installs and starts Slurm: run it as root"
! grep -qsxE 'slurm(ctl)?d' /proc/[0-9]*/comm || fail "Slurm runs here already: use another machine"
for conf in /etc/slurm/slurm.conf /etc/slurm/gres.conf; do
    [ ! -e $conf ] || head -1 $conf | grep -q 'tests/slurm.sh$' || fail "$conf belongs to another cluster"
done
command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null ||
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null; }

state=$(mktemp -d)
checkout="$state/it's a folder/hovit copy"
started=() # process ids, the last to be stopped first
run=
stop() {
    # not TERM: Snakemake would wait for its jobs, and query a Slurm that has stopped
    [ -z "$run" ] || kill -KILL "$run" 2>/dev/null || true
    for _ in $(seq 20); do # slurmd does not end its jobs: cancel them first
        jobs=$(timeout 5 squeue -h -o %i 2>/dev/null) && [ -n "$jobs" ] || break
        xargs scancel --quiet <<<"$jobs" || true
        sleep 1
    done
    for pid in "${started[@]}"; do kill "$pid" 2>/dev/null || true; done
    wait # they still write files when they end
    rm -rf /etc/slurm/slurm.conf /etc/slurm/gres.conf "$state"
}
trap stop EXIT
trap 'exit 130' INT TERM

mkdir -p /etc/slurm /run/munge "$state/ctld" "$state/d" "$checkout"
cat >/etc/slurm/slurm.conf <<CONF
# by tests/slurm.sh
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
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
NodeName=localhost CPUs=$(nproc) RealMemory=$(awk '/MemTotal/ {print int($2 / 1200)}' /proc/meminfo) Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=1440 State=UP
CONF
printf '%s\n' '# by tests/slurm.sh' 'Name=gpu File=/dev/null' 'Name=gpu File=/dev/zero' >/etc/slurm/gres.conf
chown munge: /run/munge
if ! timeout 5 munge -n >/dev/null 2>&1; then
    setpriv --reuid munge --regid munge --clear-groups munged --foreground 2>"$state/munged.log" &
    started+=($!)
fi
slurmctld -D >"$state/ctld.log" 2>&1 &
started+=($!)
slurmd -D >"$state/d.log" 2>&1 &
started+=($!)
ready=
for _ in $(seq 30); do
    timeout 5 sinfo -h -o %t 2>/dev/null | grep -q idle && { ready=1; break; }
    sleep 1
done
[ -n "$ready" ] || { tail "$state"/*.log; fail "Slurm did not start"; }
sinfo -o "%P %a %t %c CPUs, %m MB, %G"

git ls-files -coz --exclude-standard | xargs -0 cp --parents -t "$checkout"
cd "$checkout"
export PYTHONPATH="$checkout/src"
snakemake "$target" --workflow-profile profiles/slurm --jobs 4 --latency-wait 5 \
    --slurm-no-account --slurm-status-command squeue --slurm-init-seconds-before-status-checks 5 \
    --default-resources slurm_partition=main mem_mb=2000 runtime=30 >"$state/snakemake.log" 2>&1 &
run=$!

training() { # "JOB RUN SEED" of a training that is running in this checkout, if any
    local process words
    for process in /proc/[0-9]*; do
        [ "$(readlink "$process/cwd")" = "$checkout" ] || continue
        mapfile -d '' -t words <"$process/cmdline" || continue # python -m hovit train RUN --seed N
        [ "${words[*]:2:2}" = "hovit train" ] || continue
        tr '\0' '\n' <"$process/environ" | sed -n "s/^SLURM_JOB_ID=\(.*\)/\1 ${words[4]} ${words[6]}/p"
        return
    done 2>/dev/null
}
killed=
while kill -0 $run 2>/dev/null; do
    running=$(squeue -h -t R -o %k)
    if grep -q '^rule_measure' <<<"$running" && [ "$(wc -l <<<"$running")" -gt 1 ]; then
        fail "a measurement shared the node with another job: $running"
    fi
    if [ -z "$killed" ]; then
        read -r job id seed < <(training) || true
        if [ -n "${job:-}" ]; then
            scontrol show job "$job" | grep -q 'Tres.*gpu:1' || fail "the training requested no GPU"
            scancel --signal=KILL --full "$job" && killed=$job
            echo "killed Slurm's job $job while it trained $id, seed $seed"
        fi
    fi
    sleep 1
done
wait $run || { tail -40 "$state/snakemake.log"; fail "the DAG failed"; }
run=
[ -n "$killed" ] || fail "no job was killed, so no retry was tested"
grep -q "Trying to restart job" "$state/snakemake.log" || fail "the killed job was not run again"
cat "$target"

nothing_to_do() {
    snakemake -n "$target" --cores 1 2>&1 | grep -q "Nothing to be done" || fail "$1: something is left to do"
}
nothing_to_do "after Slurm"
cd "$state"
mv "$checkout" "$state/moved"
cd moved
export PYTHONPATH="$PWD/src"
nothing_to_do "after a move"
folder=results/runs/smoke/$id/seed$seed
mv "$folder" "$state/by slurm"
snakemake --cores 1 "$folder/record.json" >"$state/local.log" 2>&1 || { tail -40 "$state/local.log"; fail "the local run failed"; }
for file in weights.safetensors predictions.csv.gz; do
    [ -e "$state/by slurm/$file" ] || continue # weights that nothing reads are not kept
    cmp "$state/by slurm/$file" "$folder/$file" || fail "$folder/$file differs without Slurm"
done
echo "ok: $(grep -c 'has been submitted with SLURM jobid' "$state/snakemake.log") jobs through Slurm; $id, killed and run again, is bit-identical to a run without Slurm"
