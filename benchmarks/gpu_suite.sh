#!/usr/bin/env bash
# Everything that wants a GPU, most valuable first, within a budget of minutes: bash benchmarks/gpu_suite.sh 25
#
# Written for a bare machine with python3, torch and triton: what else is needed comes from ./wheels when that folder is there
# (`pip wheel -w wheels ./rustbpe tyro rich psutil safetensors filelock matplotlib …` on a machine with cargo), no network
# needed. Rows go to $OUT (default benchmarks/results/<device>) as they are measured, logs to $OUT/logs; a part that fails
# or runs out of time does not stop the next one.
#
#   PEER   a checkout of karpathy/nanochat to measure beside ours (optional)
#   DRY=1  the same commands in sizes that take seconds, for a CPU: finds typos before a GPU second is spent
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

minutes=${1:-25} begin=$SECONDS failed=0
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}
export NANOCHAT_BASE_DIR=${NANOCHAT_BASE_DIR:-$(mktemp -d)}
if [ -d wheels ]; then
  "$python" -m pip install -q --no-index --find-links wheels nanochat-rustbpe tyro rich psutil safetensors filelock matplotlib \
    pyarrow pyyaml requests hypothesis pytest-timeout
fi
device=$("$python" -c 'import torch; from nanochat_kernels.recorded import device_class
print(device_class(torch.device("cuda" if torch.cuda.is_available() else "cpu")))') || exit
if [ "${DRY:-0}" = 1 ]; then out=${OUT:-$(mktemp -d)}; else out=${OUT:-benchmarks/results/$device}; fi
mkdir -p "$out/logs"

# part NAME MINUTES COMMAND…: at most so long, and never past the budget
part() {
  local name=$1 limit=$(($2 * 60)) left=$((minutes * 60 - SECONDS + begin)) code
  shift 2
  if [ "$left" -lt 30 ]; then echo "[gpu_suite] no time left for $name"; return; fi
  echo "[gpu_suite] $name, at most $((left < limit ? left : limit)) s: $*"
  timeout -k 10 "$((left < limit ? left : limit))" "$@" >"$out/logs/$name.log" 2>&1
  code=$?
  tail -n 3 "$out/logs/$name.log"
  echo "[gpu_suite] $name ended with $code after $((SECONDS - begin)) s in all"
  if [ "$code" -ne 0 ] && [ "$code" -ne 124 ]; then failed=1; fi
}
bench() { # NAME MINUTES BENCHMARK FLAGS…: its rows go to $out
  local name=$1 limit=$2 which=$3
  shift 3
  part "$name" "$limit" "$python" -P -m "benchmarks.$which" "$@" --out "$out"
}

if [ "${DRY:-0}" = 1 ]; then
  part verify 3 "$python" -m nanochat_kernels.verify --ops rms_norm --sizes small --json "$out/logs/verify.json"
  bench everything 15 all --dry --minutes 14
  part profile 2 "$python" -P -m nanochat profile train --depth 1 --vocab-size 512 --seq-len 64 --rows 2 --out "$out/logs/profile"
  part report 1 "$python" -P -m benchmarks.report --results "$out" --out "$out/logs/report"
  exit "$failed"
fi

part build 4 "$python" setup.py build_ext --inplace
part verify 4 "$python" -m nanochat_kernels.verify --json "$out/logs/verify.json"
part tests 5 "$python" -m pytest -q -m gpu tests -p no:cacheprovider
bench everything "$minutes" all --minutes "$((minutes - 13 > 5 ? minutes - 13 : 5))" ${PEER:+--peer "nanochat=$PEER"}
part profile_train 2 "$python" -P -m nanochat profile train --depth 12 --seq-len 2048 --rows 16 --compile --out "$out/logs/profile"
part profile_infer 2 "$python" -P -m nanochat profile infer --depth 20 --rows 1 --out "$out/logs/profile_infer"
if sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null); then
  for tool in memcheck racecheck; do
    part "$tool" 4 "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" -m nanochat_kernels.verify --backends cuda \
      --device cuda --sizes small odd
  done
fi
part report 1 "$python" -P -m benchmarks.report --results "$(dirname "$out")" --out "$out/logs/report"
exit "$failed"
