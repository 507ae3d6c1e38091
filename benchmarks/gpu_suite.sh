#!/usr/bin/env bash
# Everything that wants a GPU, most valuable first, within a budget of minutes: bash benchmarks/gpu_suite.sh 25
#
# Written for a bare machine with python3, torch and triton: what else is needed comes from ./wheels when that folder is there
# (`pip wheel -w wheels ./rustbpe tyro safetensors filelock …` on a machine with cargo), no network needed. Results go to $OUT
# (default benchmarks/results/<device>): verify.json, train.jsonl and a log per part, each written as soon as it is known.
# A part that fails or runs out of time does not stop the next one.
#
#   PEER   a checkout of karpathy/nanochat to measure beside ours (optional)
#   DRY=1  the same commands in sizes for a CPU: finds typos before a GPU second is spent
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

minutes=${1:-25} begin=$SECONDS
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/kernels
export NANOCHAT_BASE_DIR=${NANOCHAT_BASE_DIR:-$(mktemp -d)}
if [ -d wheels ]; then
  "$python" -m pip install -q --no-index --find-links wheels nanochat-rustbpe tyro safetensors filelock hypothesis pytest-timeout
fi
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "cpu")')
out=${OUT:-benchmarks/results/$device}
mkdir -p "$out"

# part NAME MINUTES COMMAND…: at most so long, and never past the budget
part() {
  local name=$1 limit=$(($2 * 60)) left=$((minutes * 60 - SECONDS + begin))
  shift 2
  if [ "$left" -lt 30 ]; then echo "[gpu_suite] no time left for $name"; return; fi
  echo "[gpu_suite] $name, at most $((left < limit ? left : limit)) s: $*"
  timeout -k 10 "$((left < limit ? left : limit))" "$@" >"$out/$name.log" 2>&1
  local code=$?
  tail -n 3 "$out/$name.log"
  echo "[gpu_suite] $name ended with $code after $((SECONDS - begin)) s in all"
}

train() { # NAME MINUTES FLAGS…: one row of benchmarks/train.py
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" benchmarks/train.py "$@" ${PEER:+--peer nanochat=$PEER}
  tail -n 1 "$out/$name.log" | grep '^{' >>"$out/train.jsonl" || echo "[gpu_suite] no row from $name"
}

part verify 4 "$python" -m nanochat_kernels.verify --json "$out/verify.json"
part tests 5 "$python" -m pytest -q -m gpu tests -p no:cacheprovider
if [ "${DRY:-0}" = 1 ]; then
  size=(--depth 1 --vocab-size 512 --seq-len 64 --rows 2 --steps 3 --rounds 1 --dtype float32)
  train train_dry_compiled 3 "${size[@]}" --compile
  train train_dry_torch 2 "${size[@]}" --kernels torch
  exit
fi
d12=(--depth 12 --seq-len 2048 --rows 32 --steps 20 --rounds 2 --dtype bfloat16 --compile)
train d12_auto_full 6 "${d12[@]}" --window-pattern L
train d12_auto_windows 5 "${d12[@]}"
train d12_fused 4 "${d12[@]}" --kernels fused --rounds 1
for op in rms_norm rope_qk_norm linear_softcap_cross_entropy; do # the ablation: one kernel back to torch at a time
  train "d12_without_$op" 3 "${d12[@]}" --kernels "fused,$op=torch" --rounds 1
done
train d24_auto 8 --depth 24 --seq-len 2048 --rows 16 --steps 10 --rounds 1 --dtype bfloat16 --compile
