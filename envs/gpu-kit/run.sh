#!/usr/bin/env bash
# Run this kit on a machine without network, within a time budget: GPU tests, latency tables, training.
# OUT/export.tgz holds the results and is updated during training.
set -euo pipefail

usage() {
    cat <<END
usage: $0 [options]
  --budget 14m          time limit of the whole script (90s, 14m, 1h)
  --accelerator cuda    or cpu
  --jobs 8              training runs that share the device
  --compile             compile the models with torch.compile for training
  --out DIR             export.tgz and logs go here (default: out next to this script)
  --data DIR            folder with all archives, instead of data in the kit
  --resume FILE.tgz     resume from an earlier export with states
  --max-size 60M        limit of export.tgz
  --skip PARTS          skip parts, comma-separated: tests,tables,training
END
}

kit=$(cd "$(dirname "$0")" && pwd)
. "$kit/kit.env" # COMMIT, SCALE, STUDIES
budget=14m accelerator=cuda jobs=8 out=$kit/out data=$kit/data resume='' max_size=60M skip='' compile=()
while (($#)); do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --compile) compile=(--compile); shift; continue ;;
    esac
    (($# > 1)) || { usage >&2; exit 2; }
    case $1 in
        --budget) budget=$2 ;; --accelerator) accelerator=$2 ;; --jobs) jobs=$2 ;;
        --out) out=$2 ;; --data) data=$2 ;; --resume) resume=$2 ;;
        --max-size) max_size=$2 ;; --skip) skip=$2 ;;
        *) usage >&2; exit 2 ;;
    esac
    shift 2
done
[[ $budget =~ ^[1-9][0-9]*[smh]?$ ]] || { echo "error: --budget $budget: write 90s, 14m or 1h" >&2; exit 2; }
[[ $accelerator =~ ^(cpu|cuda)$ ]] || { echo "error: --accelerator $accelerator: write cpu or cuda" >&2; exit 2; }
case $budget in
    *h) total=$((${budget%h} * 3600)) ;; *m) total=$((${budget%m} * 60)) ;; *) total=${budget%s} ;;
esac
left() { echo $((total - SECONDS)); } # SECONDS counts from the start of this script
at_most() { echo $(($1 < $(left) - 5 ? $1 : $(left) - 5)); }
failed=0
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd) data=$(cd "$data" && pwd)
[[ -z $resume ]] || resume=$(realpath "$resume")

cd "$kit"
for wheel in wheels/*.whl; do
    [[ ! -e $wheel ]] || "$python" -m zipfile -e "$wheel" site
done
for archive in packed/*.tar.gz; do
    [[ ! -e $archive ]] || tar -xzf "$archive" --no-same-owner -C hovit
done
cd hovit
[[ -z $resume ]] || tar -xzf "$resume" --no-same-owner
export PYTHONPATH="$kit/site:$kit/hovit/src" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
export PYTHONDONTWRITEBYTECODE=1
[[ $accelerator == cpu ]] || nvidia-smi >"$out/device.txt" 2>&1 || true
echo "commit $COMMIT, studies $STUDIES, scale $SCALE, $total s"

# part NAME PERCENT COMMAND...: run a command, with its share of the budget in place of LIMIT
part() {
    local name=$1 limit=$(at_most $((total * $2 / 100)))
    shift 2
    [[ ",$skip," != *",$name,"* ]] || return 0
    if ((limit < 30)); then
        echo "$name: no time left"
        return 0
    fi
    echo "$name: at most $limit s"
    local began=$SECONDS code=0
    "${@//LIMIT/$limit}" >"$out/$name.log" 2>&1 || code=$?
    ((code == 0)) || failed=1
    tail -n 3 "$out/$name.log"
    echo "$name: exit code $code after $((SECONDS - began)) s, $(left) s left"
}

sweep=("$python" -m hovit sweep --scale "$SCALE" --data-root "$data" --accelerator "$accelerator")
for study in $STUDIES; do sweep+=(--study "$study"); done
sweep+=(--export "$out/export.tgz" --states --max-size "$max_size" --priority)

part tests 25 timeout --kill-after=5 LIMIT "$python" -m pytest -q -m gpu -p no:cacheprovider tests
part tables 45 "${sweep[@]}" --only measure --budget LIMIT
part training 100 "${sweep[@]}" --only train --jobs "$jobs" "${compile[@]}" --budget LIMIT
if [[ -e $out/export.tgz ]]; then
    echo "copy back $out/export.tgz ($(($(wc -c <"$out/export.tgz") / 1000)) kB): hovit evidence add export.tgz"
fi
exit "$failed"
