#!/usr/bin/env bash
# Run all stages of ssrctl on the bundled reasoner, each as its own command, with all files in one folder.
#
#   bash examples/quickstart.sh [FOLDER]        (default: demo; replaces an earlier demo there)
set -euo pipefail

out=${1:-demo}
seed=0
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

if [ -e "$out" ] && [ ! -e "$out/.ssrctl-demo" ]; then
  echo "quickstart: $out exists and is not an earlier demo; name another folder" >&2
  exit 2
fi
rm -rf "$out"
mkdir -p "$out"
touch "$out/.ssrctl-demo"

stage() { printf '\n== %s\n' "$*" >&2; "$@"; }

# 1. Find the weights that the model's language depends on. Training will not touch them.
stage ssrctl superweights -o "$out/superweights.safetensors" --seed $seed

# 2. Measure the accuracy on held-out problems, sampled at temperature 1.
stage ssrctl eval -o "$out/eval-base" --seed $seed

# 3. Cut the responses into reasoning steps and score each step.
stage ssrctl segment "$out/eval-base/samples.jsonl" -o "$out/steps.jsonl"
stage ssrctl critic "$out/steps.jsonl" -o "$out/scored.jsonl"

# 4. Measure how much gradient is left for later steps once earlier ones have claimed their coordinates.
stage ssrctl profile-budget --protect "$out/superweights.safetensors" -o "$out/budget.json" --seed $seed

# 5. Train: each reasoning step updates its own coordinates.
stage ssrctl train --optimizer kronos --protect "$out/superweights.safetensors" \
  --budget-profile "$out/budget.json" --max-steps 120 --log-gradient-cosine \
  --output-dir "$out/run" --seed $seed

# 6. Measure what the updates did to the weights, and how the coordinate sets of the steps overlap.
stage ssrctl diagnose tiny-reasoner "$out/run" -o "$out/diagnose"
stage ssrctl diagnose --jaccard "$out/run"

# 7. Measure the accuracy again on the same problems, paired with step 2.
stage ssrctl eval --checkpoint "$out/run" --baseline "$out/eval-base" -o "$out/eval-trained" --seed $seed

printf '\nreports: %s\n         %s\n         %s\n' \
  "$out/run/report.html" "$out/run/diagnose-steps.html" "$out/diagnose/diagnose.html"
