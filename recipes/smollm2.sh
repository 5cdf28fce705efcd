#!/usr/bin/env bash
# The whole pipeline on real text with a small model, offline: `make smollm2 HH=FILE`, or
#
#     HH=harmless-base.jsonl.gz MODEL=runs/models/smollm2-135m-instruct OUT=runs/smollm2 recipes/smollm2.sh
#
# HH-RLHF rows -> two reward models on disjoint halves, one to annotate and one to evaluate (as the paper keeps two
# apart) -> SFT -> candidates -> rewards -> four methods, each over SEEDS seeds -> evaluation -> tables with intervals.
# The seeds are of preference training alone. Three hours on two cores; SMALL=1 takes minutes and checks the path, not
# the claim. The same command again goes on where it was stopped. PYTHON=echo prints the commands.
set -euo pipefail

HH=${HH:?names a file of HH-RLHF rows, say HH=harmless-base.jsonl.gz}
[ -f "$HH" ] || { echo "HH=$HH: no such file; it names rows of HH-RLHF (harmless-base.jsonl.gz, say)" >&2; exit 1; }
HH=$(realpath "$HH")
cd "$(dirname "$0")/.."
. recipes/stages.sh
PYTHON=${PYTHON:-python}
MODEL=${MODEL:-runs/models/smollm2-135m-instruct} # start of everything: a folder or a hub name
OUT=${OUT:-runs/smollm2${SMALL:+-small}}

# Sizes: rows of the splits, candidates and samples per prompt, epochs and seeds of preference training.
if [ "${SMALL:-}" ]; then
  : "${REWARD:=16}" "${HELDOUT:=16}" "${TRAIN:=8}" "${TEST:=6}" "${N:=4}" "${SAMPLES:=2}"
  : "${EPOCHS:=1}" "${SEEDS:=1}" "${NEW_TOKENS:=64}"
fi
: "${REWARD:=480}" "${HELDOUT:=128}" "${TRAIN:=128}" "${TEST:=64}" "${N:=8}" "${SAMPLES:=5}"
: "${EPOCHS:=2}" "${SEEDS:=3}" "${NEW_TOKENS:=96}"

one_choice "$HH $MODEL $REWARD $HELDOUT $TRAIN $TEST $N $SAMPLES $EPOCHS $NEW_TOKENS"

# 1. Disjoint splits, cut off one after the other. A fifth of the prompts is longer than generation takes below, so a
# third more rows are imported where prompts are answered.
skip=0
split() { # NAME ROWS
  rows_of "$1" "$HH" "" "$skip" "$2" --source=hh-rlhf
  skip=$((skip + $2))
}
split reward-a "$REWARD"
split reward-b "$REWARD"
split heldout "$HELDOUT"
split train $((TRAIN + (TRAIN + 2) / 3))
split test $((TEST + (TEST + 2) / 3))

# Most rows fit (the median prompt has 120 tokens in this model's template), and steps stay short.
lengths=(--max_length=384 --tokens_per_micro_batch=1536)
train=("${lengths[@]}" --prompts_per_step=8 --token_cache="$OUT/token_cache")

# 2. Two reward models, and their rewards for pairs that neither has seen. LoRA of rank 8 over some 50 steps wants large
# rates: at 1e-4 their loss stayed at log 2 and that of SFT where it began.
for model in a b; do
  step "$OUT/reward-$model/policy" train.py --loss=reward --model="$MODEL" --data="$OUT/reward-$model.jsonl" \
    --out="$OUT/reward-$model" --lr=1e-3 --epochs=1 "${train[@]}"
  step "$OUT/heldout-$model.jsonl" data_prep.py annotate --scorer="$OUT/reward-$model/policy" \
    --input="$OUT/heldout.jsonl" --output="$OUT/heldout-$model.jsonl"
done

# 3. The policy that everything starts from.
step "$OUT/sft/policy" train.py --loss=sft --model="$MODEL" --data="$OUT/train.jsonl" --out="$OUT/sft" --lr=5e-4 \
  --epochs=2 "${train[@]}"
step "$OUT/sft/merged" -m hps.evaluate.export --model="$OUT/sft/policy" --out="$OUT/sft/merged"

# 4. Its candidates, with rewards to train on by model a and to test on by model b. 192 rows at once hold 3 GB of keys
# and values.
candidates() { # SPLIT ROWS REWARD_MODEL
  step "$OUT/$1-candidates.jsonl" data_prep.py generate --model="$OUT/sft/merged" --input="$OUT/$1.jsonl" \
    --output="$OUT/$1-candidates.jsonl" --n="$N" --limit="$2" --max_prompt_length=256 --max_new_tokens="$NEW_TOKENS" \
    --max_rows=192
  step "$OUT/$1-scored.jsonl" data_prep.py annotate --scorer="$OUT/reward-$3/policy" \
    --input="$OUT/$1-candidates.jsonl" --output="$OUT/$1-scored.jsonl"
}
candidates train "$TRAIN" a
candidates test "$TEST" b

# 5. Preference training and evaluation, row by row of the table; SFT is the row that the others' win rate is against.
evaluate() { # MODEL FOLDER MORE...
  step "$2/eval.json" eval.py --model="$1" --reference="$OUT/sft/merged" --data="$OUT/test-scored.jsonl" --out="$2" \
    --scorer="$OUT/reward-b/policy" --samples="$SAMPLES" --max_new_tokens="$NEW_TOKENS" "${lengths[@]}" \
    --reference_cache="$OUT/reference_cache" "${@:3}"
}
row() { # SEED NAME OPTIONS OF THE METHOD...
  local run=$OUT/$2/run-$1
  step "$run/policy" train.py "${@:3}" --model="$OUT/sft/merged" --data="$OUT/train-scored.jsonl" --out="$run" \
    --lr=3e-4 --epochs="$EPOCHS" --seed="$1" --reference_cache="$OUT/reference_cache" "${train[@]}"
  evaluate "$run/policy" "$run/test" --baseline="$OUT/SFT/run-0/test"
}
evaluate "$OUT/sft/merged" "$OUT/SFT/run-0/test"
seeds row DPO-BT --method=dpo-bt
seeds row DPO-PL-4 --method=dpo-pl --pl_responses=4
seeds row DPO-uniform --method=dpo-uniform
seeds row DPO-HPS --method=dpo-hps --reward_norm=zscore --reward_scale=0.5 # on raw ones gamma = -5 to 5 is nearly an argmax

# 6. Tables, figures, intervals over prompts, samples to read.
"$PYTHON" -m hps.evaluate.compare SFT="$OUT/SFT" DPO-BT="$OUT/DPO-BT" DPO-PL-4="$OUT/DPO-PL-4" \
  DPO-uniform="$OUT/DPO-uniform" DPO-HPS="$OUT/DPO-HPS" --baseline=DPO-HPS --out="$OUT"
