#!/usr/bin/env bash
# From an empty machine to a trained model: `bash runs/quickstart.sh`. Needs no network beyond package registries, because the
# text is generated. Every stage is skipped when it is done already, so run it again after an interruption.
#
#   NANOCHAT_BASE_DIR   where everything goes (default ~/.cache/nanochat)
#   DEPTH, STEPS        size of the model and length of training (default 4 and 600)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/setup.sh

nanochat data --source builtin
nanochat tok-train --source builtin --vocab-size 4096
nanochat train --source builtin --depth "${DEPTH:-4}" --steps "${STEPS:-600}"
nanochat
