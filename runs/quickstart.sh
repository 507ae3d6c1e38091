#!/usr/bin/env bash
# From an empty machine to a trained model: `bash runs/quickstart.sh`. Needs no network beyond package registries, because the
# text is generated. Every stage goes on where it was interrupted and is skipped when done, so run it again at any time.
#
#   NANOCHAT_BASE_DIR   where everything goes (default ~/.cache/nanochat)
#   DEPTH, STEPS        size of the model and length of its training (default 4 and 200: 1.6 million tokens)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/setup.sh

base=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}
depth=${DEPTH:-4} steps=${STEPS:-200}

nanochat data --source builtin
[ -d "$base/tokenizer" ] || nanochat tok-train --data builtin --vocab-size 4096
nanochat train --data builtin --depth "$depth" --seq-len 512 --batch-tokens 8192 --steps "$steps" \
  --tag "quickstart-d$depth" --eval-every 100 --eval-tokens 65536 --sample-every 100 --save-every 100
nanochat chat -p "Once upon a time" --max-tokens 60
nanochat
