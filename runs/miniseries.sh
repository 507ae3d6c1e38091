#!/usr/bin/env bash
# A series of models from small to large: `bash runs/miniseries.sh`. Each is trained and evaluated like the speedrun's; at
# the end a table and a plot of time, FLOPs, bits per byte and CORE. Killed anywhere, it goes on from there when run again,
# and more models can be added later.
#
#   SERIES              DEPTH:RATIO of each model; the last three spend more than the speedrun on the sizes that matter
#   RANKS, DATA, SHARDS, VOCAB, DATA_FLAGS, TRAIN_FLAGS, EVAL_FLAGS, SETUP      as in speedrun.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/stages.sh

text_and_tokenizer "${SHARDS:-400}"
tags=()
for point in ${SERIES:-10:12 12:12 14:12 16:12 18:12 20:12 24:8 24:12 24:20 28:12}; do
  [[ $point =~ ^[0-9]+:[0-9.]+$ ]] || die "SERIES has $point, which is not DEPTH:RATIO, such as 12:8"
  tag=series-d${point%:*}-r${point#*:}
  base_model "$tag" "${point%:*}" "${point#*:}"
  tags+=("$tag")
  python benchmarks/miniseries.py "${tags[@]}" >/dev/null  # what is known so far, should the rest never come
done
stage "results"
python benchmarks/miniseries.py "${tags[@]}"
