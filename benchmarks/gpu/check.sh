#!/usr/bin/env bash
# All that a first visit to a GPU needs, in at most nine minutes, without a network:
#
#     benchmarks/gpu/check.sh [--device cpu] [--only "PART PART"] [OUT]
#
# Wants CPython 3.11 or later, torch and numpy ($PYTHON, by default python3) and the wheels of wheels.sh. Writes its
# tables, each row as it comes, into OUT (benchmarks/gpu/out). Each part has a time limit and goes on when one fails;
# the last line says which passed, failed and were cut. --only runs these parts, after the wheels. --device cpu takes
# the same paths at small sizes, to try the script where there is no GPU.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
device=cuda only=
while [[ "${1:-}" = --* ]]; do
    case $1 in
        --device) device=$2 ;;
        --only) only=" wheels $2 " ;;
        *) echo "got $1; expected --device or --only" >&2 && exit 2 ;;
    esac
    shift 2
done
mkdir -p "${1:-$here/out}"
out=$(cd "${1:-$here/out}" && pwd)
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONPATH="$root/src:$site" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 POLYFED_TEST_DEVICE=$device
export CUDA_DEVICE_ORDER=PCI_BUS_ID
unset POLYFED_DATA  # noise everywhere: nothing depends on what pictures show
if [ "$device" = cpu ]; then
    export OMP_NUM_THREADS=1
    small=(--small) turns=1 patience=0 workloads=(small-cnn-10) fedmrl=4
else
    small=() turns=3 patience=2 workloads=(fedmrl-64 mlp-10 small-cnn-10 testing fedmrl-250) fedmrl=24
fi
passed=() failed=() cut=()

part() { # NAME SECONDS COMMAND...
    local name=$1 seconds=$2 started=$SECONDS code=0
    shift 2
    [ -z "$only" ] || [[ "$only" = *" $name "* ]] || return 0
    echo "== $name, at most $seconds s"
    timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee -a "$out/check.log"
    code=${PIPESTATUS[0]}
    echo "-- $name: exit code $code after $((SECONDS - started)) s" | tee -a "$out/check.log"
    case $code in
        0) passed+=("$name") ;;
        124 | 137) cut+=("$name") ;;
        *) failed+=("$name") ;;
    esac
}

: >"$out/check.log"
# 505 seconds in all; another 5 are given to each part that does not end when it is told to.
part wheels 25 "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
    --disable-pip-version-check --root-user-action ignore --target "$site" "$here"/wheels/*.whl
part environment 20 "$python" "$here/environment.py" "$out" "$device"
part tests 80 "$python" -m pytest -o addopts= -p no:cacheprovider -m gpu --tb=short --durations=5 "$root/tests/gpu" \
    --rootdir "$root" -c "$root/pyproject.toml"
part algorithms 130 "$python" "$here/algorithms.py" "$out" "$device"
part fedmrl 105 "$python" "$here/fedmrl.py" "$out" "$device" "${small[@]}" --seconds "$fedmrl"
part memory 40 "$python" "$here/memory.py" "$out" "$device" "${small[@]}"
part speed 105 "$python" "$root/benchmarks/speed/speed.py" --device "$device" --only "${workloads[@]}" \
    --turns "$turns" --patience "$patience" --out "$out/speed.json"
echo "$SECONDS s; passed: ${passed[*]:-none}; failed: ${failed[*]:-none}; cut: ${cut[*]:-none}" | tee -a "$out/check.log"
[ ${#failed[@]} -eq 0 ] && [ ${#cut[@]} -eq 0 ]
