# shellcheck shell=bash
# What speedrun.sh and miniseries.sh share; sourced by them, after `set -euo pipefail` and from the repository's root.
# Every stage goes on where it was interrupted and is skipped when it is done, so the scripts can be run again at any time.

if [ "${SETUP:-1}" = 1 ]; then source runs/setup.sh; fi
export NANOCHAT_BASE_DIR=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
RANKS=${RANKS:-$( (nvidia-smi -L 2>/dev/null || echo CPU) | wc -l)}
DATA=${DATA:-climbmix} VOCAB=${VOCAB:-32768} FIRST_SHARDS=${FIRST_SHARDS:-8}
# Flags of each stage are split at spaces, so that the environment can hold several.
read -ra data_flags <<<"${DATA_FLAGS:-}"
read -ra train_flags <<<"${TRAIN_FLAGS:-}"
read -ra eval_flags <<<"${EVAL_FLAGS:-}"

stage() { printf '\n\033[1;34m[%s] %s\033[0m\n' "$(date +%T)" "$*"; }
die() { printf '\033[1;31merror:\033[0m %s\n' "$*" >&2; exit 1; }
nano() { python -m nanochat "$@"; }
on_ranks() {
  if [ "$RANKS" = 1 ]; then nano "$@"; else
    python -m torch.distributed.run --standalone --nproc_per_node="$RANKS" -m nanochat "$@"
  fi
}
newest_step() { find "$1" -maxdepth 1 -name 'step_*' 2>/dev/null | sed 's/.*step_//' | sort | tail -n 1; }
has_flag() { nano "$1" --help 2>/dev/null | grep -q -- "$2"; }

# text_and_tokenizer SHARDS: the vocabulary needs the first shards only, so the others arrive while it is learned.
text_and_tokenizer() {
  stage "text: $DATA"
  nano data --source "$DATA" --shards "$FIRST_SHARDS" ${data_flags[@]+"${data_flags[@]}"}
  nano data --source "$DATA" --shards "$1" ${data_flags[@]+"${data_flags[@]}"} >/dev/null &
  local download=$!
  trap 'kill '"$download"' 2>/dev/null || true' EXIT
  stage "tokenizer: $VOCAB tokens"
  if [ -f "$NANOCHAT_BASE_DIR/tokenizer/settings.json" ]; then echo "is there"; else
    nano tok-train --data "$DATA" --vocab-size "$VOCAB"
  fi
  wait "$download" || die "the text could not be fetched; run this again to go on"
  trap - EXIT
}

# base_model TAG DEPTH RATIO [FLAGS...]: trains and evaluates; the file of results is $RESULT then.
base_model() {
  local tag=$1 depth=$2 ratio=$3 folder=$NANOCHAT_BASE_DIR/base_checkpoints/$1
  shift 3
  stage "base model $tag: depth $depth, $ratio tokens per parameter, $RANKS rank(s)"
  on_ranks train --data "$DATA" --tag "$tag" --depth "$depth" --ratio "$ratio" "$@" ${train_flags[@]+"${train_flags[@]}"}
  stage "CORE and bits per byte of $tag"
  RESULT=$folder/eval_$(newest_step "$folder").json
  if [ -f "$RESULT" ]; then echo "is there"; else
    on_ranks eval --stage base --tag "$tag" ${eval_flags[@]+"${eval_flags[@]}"}
  fi
  export RESULT
}
