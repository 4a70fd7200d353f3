#!/usr/bin/env bash
# All stages of ssrctl on the bundled reasoner, each as its own command, files in one folder.
#
#   bash examples/quickstart.sh [FOLDER]        (default: demo; an earlier demo there is replaced)
set -euo pipefail

out=${1:-demo}
seed=0
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

if [ -e "$out" ] && [ ! -e "$out/.ssrctl-demo" ]; then
  echo "quickstart: $out exists and is no earlier demo; name another folder" >&2
  exit 2
fi
rm -rf "$out"
mkdir -p "$out"
touch "$out/.ssrctl-demo"

stage() { printf '\n== %s\n' "$*" >&2; "$@"; }

# 1. Which weights does the model's own language hang on? They will be frozen.
stage ssrctl superweights -o "$out/superweights.safetensors" --seed $seed

# 2. Where does the model stand? Held-out problems, sampled at temperature 1.
stage ssrctl eval -o "$out/eval-base" --seed $seed

# 3. Its responses, cut into steps and scored, one file to the next.
stage ssrctl segment "$out/eval-base/samples.jsonl" -o "$out/steps.jsonl"
stage ssrctl critic "$out/steps.jsonl" -o "$out/scored.jsonl"

# 4. How much gradient is left for later steps once earlier ones have claimed theirs?
stage ssrctl profile-budget --protect "$out/superweights.safetensors" -o "$out/budget.json" --seed $seed

# 5. Step-wise reinforcement learning: every reasoning step updates its own weights.
stage ssrctl train --optimizer kronos --protect "$out/superweights.safetensors" \
  --budget-profile "$out/budget.json" --max-steps 120 --log-gradient-cosine \
  --output-dir "$out/run" --seed $seed

# 6. What did the updates do to the weights, and do the steps update the same ones?
stage ssrctl diagnose tiny-reasoner "$out/run" -o "$out/diagnose"
stage ssrctl diagnose --jaccard "$out/run"

# 7. Did it learn? The same held-out problems as in 2, paired.
stage ssrctl eval --checkpoint "$out/run" --baseline "$out/eval-base" -o "$out/eval-trained" --seed $seed

printf '\nreports: %s\n         %s\n' "$out/run/report.html" "$out/diagnose/report.html"
