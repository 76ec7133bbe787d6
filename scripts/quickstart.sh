#!/usr/bin/env bash
# The whole road on one CPU, in a few minutes: a model that thinks before it answers is converted to megatron format, tuned with
# expert-parallel LoRA into one that answers at once, merged back, checked and asked. Every command is printed before it runs.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
started=$SECONDS

run() {
    printf '\n\033[1m$ %s\033[0m\n' "$*"
    "$@"
}

rm -rf runs/tiny runs/tiny_*
echo "1. A tiny GLM-4.5 with random weights learns, by full fine-tuning, to think and then name the seats of 34 divisions."
run glm45-tune tiny runs/tiny
run glm45-tune train recipes/tiny_sft.yaml
run glm45-tune export runs/tiny_sft --output runs/tiny_thinking

echo; echo "2. It becomes a megatron checkpoint, every byte verified; megatron and transformers compute the same with it."
run glm45-tune convert --to-mcore --model runs/tiny_thinking --output runs/tiny_thinking_mcore
run glm45-tune verify runs/tiny_thinking runs/tiny_thinking_mcore --forward

echo; echo "3. LoRA on two ranks, experts cut between them, teaches it to answer without thinking."
run glm45-tune train recipes/tiny_lora.yaml

echo; echo "4. All questions to the base and to the tuned model. The last file asks in words neither was taught, and it shows."
run glm45-tune eval runs/tiny_lora --data data_examples/seats_at_once.jsonl --data data_examples/seats_new_phrasing.jsonl \
    --output runs/tiny_scores.json
python - runs/tiny_scores.json <<'PYTHON'
import json, sys

thinking, _, tuned, _ = json.load(open(sys.argv[1], encoding="utf-8"))
good = thinking["thinks"] >= 0.9 and tuned["exact"] >= 0.9 and tuned["thinks"] == 0
print("The tuned model answers exactly and at once." if good else "The tuned model did not learn what it should.")
sys.exit(not good)
PYTHON

echo; echo "5. The adapter is merged into a Hugging Face model again; two ways to merge give the same bytes. Its card says all this."
run glm45-tune export runs/tiny_lora --output runs/tiny_at_once
run glm45-tune convert --to-hf --model runs/tiny_thinking_mcore --adapter runs/tiny_lora --output runs/tiny_merged_again
run glm45-tune verify runs/tiny_at_once runs/tiny_merged_again
run sed -n '/^## Evaluation/,/^What differs/p' runs/tiny_at_once/README.md

echo; echo "6. A question to both."
run glm45-tune chat runs/tiny_thinking --prompt '浙江的省会在哪?'
run glm45-tune chat runs/tiny_at_once --prompt '浙江的省会在哪?'
echo; echo "To a hub: glm45-tune push runs/tiny_at_once --to hf:ORG/NAME (or ms:)."
echo "done in $((SECONDS - started)) s; look into runs/"
