#!/usr/bin/env bash
# A model's life in a CI job: text, tokens, a model, an assistant, a gate. No downloads, no GPU;
# so small that it only shows that all works.
# Each step is checked by its exit code, and its figures are read from --json.
#   examples/ci/life.sh [DIRECTORY]
set -euo pipefail

out="${1:-runs/ci}"
export HF_HUB_OFFLINE=1

# One value of a JSON object on stdin, such as `val_loss` or `error.code`.
value() {
  python3 -c '
import functools, json, sys
found = functools.reduce(lambda object, key: object[key], sys.argv[1].split("."), json.load(sys.stdin))
print(found)' "$1"
}

# Run a command that must end with the given exit code; its stdout goes on.
expect() {
  local wanted="$1" code=0
  shift
  "$@" || code=$?
  if [ "$code" -ne "$wanted" ]; then
    echo "ended with $code, where $wanted was expected: $*" >&2
    exit 1
  fi
}

small=(--layers 2 --hidden 32 --heads 2 --context 128 --batch-size 4 --eval-tokens 1024)
tune=(--data builtin:tasks --max-steps 4 --batch-size 4 --val-size 4 --samples 0 --threads 1)

mkdir -p "$out"
for _ in $(seq 20); do python3 -c 'import this'; done >"$out/corpus.txt"
expect 0 llmctl tokenize --data "$out/corpus.txt" --vocab-size 300 -o "$out/tok" --overwrite -q
base="$(expect 0 llmctl pretrain --tokens "$out/tok" "${small[@]}" --max-steps 10 \
  --threads 1 -o "$out/base" --overwrite -q --json)"
echo "pretrain: val_loss $(value val_loss <<<"$base"), $(value tokens_per_second <<<"$base") tokens/s"

sft="$(expect 0 llmctl sft --model "$out/base" "${tune[@]}" -o "$out/sft" --overwrite -q --json)"
echo "sft: val_loss $(value val_loss <<<"$sft")"

# A run that is complete is left alone, so a job that is started again costs nothing.
expect 0 llmctl sft --model "$out/base" "${tune[@]}" -o "$out/sft" --resume -q >/dev/null

answer="$(expect 0 llmctl generate --model "$out/sft" --chat --prompt "What is 2 plus 3?" \
  --max-new-tokens 8 --num-samples 1 -q --json)"
echo "generate: $(value finish_reason <<<"$answer")"

# A gate: what does not hold ends with 8, and the job fails.
printf 'The return value is a string.\n' >"$out/held-out.txt"
judged="$(expect 0 llmctl evaluate --model "$out/base" --data "$out/held-out.txt" \
  --require 'perplexity<1000' -o "$out/eval" --overwrite -q --json)"
echo "evaluate: perplexity $(value perplexity <<<"$judged")"
refused="$(expect 8 llmctl evaluate --model "$out/base" --data "$out/held-out.txt" \
  --require 'perplexity<1.01' -o "$out/gate" --overwrite -q --json)"
echo "gate: $(value error.message <<<"$refused")"

# What is wrong with a call has a code of its own: 2 usage, 3 data, 4 model, …
usage="$(expect 2 llmctl sft --model "$out/base" --data builtin:tasks --lora-rang 8 --json)"
echo "usage: $(value error.message <<<"$usage")"
printf '{"prompt": "no answer"}\n' >"$out/bad.jsonl"
data="$(expect 3 llmctl sft --model "$out/base" --data "$out/bad.jsonl" -o "$out/none" -q --json)"
echo "data: $(value error.file <<<"$data"):$(value error.line <<<"$data")"
expect 4 llmctl generate --model "$out/tok" --prompt x -q

echo "all of it held: $out"
