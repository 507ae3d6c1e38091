#!/usr/bin/env bash
# GPT-2's capability from an empty machine with 8 H100s: `bash runs/speedrun.sh`. Text, tokenizer, the model of depth 24
# in FP8, CORE, chat tuning, report. Killed anywhere, it goes on from there when run again. It ends with an error when
# CORE stays at or below GPT-2's 0.256525.
#
# Everything can be made smaller (tests/runs runs all of it on two processes of a laptop's CPU):
#   DEPTH, RATIO        24 and 8: size of the model, training tokens per parameter
#   RANKS               processes, one for each GPU by default
#   DATA, SHARDS        climbmix and 170; NANOCHAT_DATA_URL names a mirror of the hub
#   VOCAB, TAG          32768 and speedrun-d$DEPTH
#   MIN_CORE            0.256525
#   DATA_FLAGS, TRAIN_FLAGS, EVAL_FLAGS, SFT_FLAGS, CHAT_EVAL_FLAGS     further flags of each stage
#   SKIP                stages to leave out, of: core sft chat-eval report
#   SETUP=0             use the environment that is active instead of making .venv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/stages.sh

depth=${DEPTH:-24} ratio=${RATIO:-8} min_core=${MIN_CORE:-0.256525} tag=${TAG:-speedrun-d${DEPTH:-24}}
read -ra sft_flags <<<"${SFT_FLAGS:-}"
read -ra chat_eval_flags <<<"${CHAT_EVAL_FLAGS:-}"
wanted() { [[ " ${SKIP:-} " != *" $1 "* ]]; }

fp8=()
if nvidia-smi -L 2>/dev/null | grep -qE 'H100|H200|B200' && has_flag train --fp8; then fp8=(--fp8); fi

text_and_tokenizer "${SHARDS:-170}"
base_model "$tag" "$depth" "$ratio" ${fp8[@]+"${fp8[@]}"}

if wanted core; then
  stage "CORE against GPT-2"
  python - "$RESULT" "$min_core" <<'PYTHON'
import json
import sys

path, least = sys.argv[1], float(sys.argv[2])
found = json.load(open(path)).get("core")
if found is None:
    sys.exit(f"error: {path} has no CORE; delete it and run this again")
verdict = "above" if found["core"] > least else "NOT above"
print(f"{found['label']} {found['core']:.6f} is {verdict} {least:.6f}")
if found["core"] <= least:
    sys.exit("error: the base model is not good enough; the stages after it were not run")
PYTHON
fi

if wanted sft; then
  stage "chat tuning"
  on_ranks sft --from-tag "$tag" --tag "$tag" ${sft_flags[@]+"${sft_flags[@]}"}
fi

if wanted chat-eval; then
  stage "chat evaluation"
  folder=$NANOCHAT_BASE_DIR/sft_checkpoints/$tag
  step=$(newest_step "$folder")
  [ -n "$step" ] || die "there is no tuned model in $folder; leave sft out of SKIP"
  if [ -f "$folder/chat_eval_$step.json" ]; then echo "is there"; else
    on_ranks chat-eval --stage sft --tag "$tag" ${chat_eval_flags[@]+"${chat_eval_flags[@]}"}
  fi
fi

if wanted report; then
  stage "report"
  nano report
fi
stage "done: talk to it with \`nanochat chat\`"
