#!/usr/bin/env bash
# From an empty machine to a small model worth talking to: `bash runs/quickstart.sh`. Text, tokenizer, base model, fine-tuning,
# reinforcement learning, evaluation, a report, a chat. Needs no network beyond package registries, because the text is
# generated. Every stage goes on where it was interrupted and is skipped when done, so run it again at any time.
#
#   NANOCHAT_BASE_DIR                where everything goes (default ~/.cache/nanochat)
#   DEPTH                            layers of the model (default 3: 2 million parameters)
#   STEPS, SFT_STEPS, RL_STEPS       length of the stages (default 700 steps of 2,048 tokens, 1,000 of 1,024, and 25)
#   SEED                             seed of the initial weights and of the practice (default 42)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/setup.sh

base=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}
depth=${DEPTH:-3} seed=${SEED:-42} tag=quickstart-d${DEPTH:-3}
graded=builtin:arithmetic,builtin:letter_count,builtin:spelling
begin=$SECONDS

stage() { printf '\n\033[1;34m[quickstart]\033[0m %s (%d s so far)\n' "$*" $((SECONDS - begin)); }

stage "text from the built-in world, and a tokenizer"
nanochat data --source builtin
[ -d "$base/tokenizer" ] || nanochat tok-train --data builtin --vocab-size 512

stage "base model: learning English, copying and spelling"
nanochat train --data builtin --depth "$depth" --head-dim 64 --seq-len 256 --batch-tokens 2048 --steps "${STEPS:-700}" \
  --tag "$tag" --seed "$seed" --eval-every 350 --eval-tokens 32768 --sample-every 350 --save-every 100

stage "fine-tuning: learning to answer"
nanochat sft --data builtin --from-tag "$tag" --steps "${SFT_STEPS:-1000}" --batch-tokens 1024 --lr 2 --seed "$seed" \
  --eval-every 500 --eval-tokens 32768 --sample-every 500 --save-every 200

stage "reinforcement learning: practicing word problems"
nanochat rl --data word-problems --from-tag "$tag" --steps "${RL_STEPS:-25}" --samples 8 --max-tokens 96 --lr 0.006 --seed "$seed" \
  --eval-every 25 --eval-problems 500 --eval-samples 1 --save-every 10

stage "evaluation on questions that no stage has seen"
ls "$base/rl_checkpoints/$tag"/chat_eval_*.json >/dev/null 2>&1 ||
  nanochat chat-eval --stage rl --tag "$tag" --tasks "$graded" --max-problems 500 --max-tokens 96

stage "report and a first chat"
nanochat report
for question in "Who are you?" "What is 123 * 45?" "How many r's are in strawberry?" "Tell me a story about a lost key."; do
  printf '\n\033[1m> %s\033[0m\n' "$question"
  nanochat chat --stage rl --tag "$tag" --temperature 0.3 --seed "$seed" -p "$question"
done

cat <<END

Done in $(((SECONDS - begin) / 60)) minutes and $(((SECONDS - begin) % 60)) seconds.
  read      $base/report/report.html
  talk      source .venv/bin/activate && nanochat chat
  serve     pip install --no-build-isolation -e '.[serve]' && nanochat serve    (a web page and OpenAI's API)
  practice  RL_STEPS=100 makes it better at word problems (delete $base/rl_checkpoints/$tag first)
  larger    DEPTH=6 bash runs/quickstart.sh; on a GPU with real text: nanochat data, tok-train, train, sft, rl
  your own  nanochat sft --data builtin+jsonl:PATH --tag mine
END
