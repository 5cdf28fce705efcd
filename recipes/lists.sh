#!/usr/bin/env bash
# Real lists: one prompt, some forty answers of real models, a judge's preference for each as its reward.
#
#     ALPACA=alpaca_eval/results MODEL=runs/models/smollm2-135m-instruct OUT=runs/lists recipes/lists.sh
#
# ALPACA is the folder `results` of tatsu-lab/alpaca_eval; LISTS=FILE takes list-wise rows instead. The rewards are the
# judge's taste, not truth: they follow length, and a text that games the judge wins (stage 1 says what does).
# Lists -> what wins -> train, validation and test by prompts -> beta and lr of each method on validation prompts -> the
# chosen setting over SEEDS seeds -> margins on test prompts -> tables with intervals over prompts.
# SMALL=1 takes minutes and checks the path. The same command again goes on where it was stopped. PYTHON=echo prints the
# commands.
set -euo pipefail

ALPACA=${ALPACA:-}
LISTS=${LISTS:-}
[ -d "$ALPACA" ] || [ -f "$LISTS" ] || { echo "name ALPACA=FOLDER (alpaca_eval/results) or LISTS=FILE" >&2; exit 1; }
[ -z "$ALPACA" ] || ALPACA=$(realpath "$ALPACA")
[ -z "$LISTS" ] || LISTS=$(realpath "$LISTS")
cd "$(dirname "$0")/.."
. recipes/stages.sh
PYTHON=${PYTHON:-python}
MODEL=${MODEL:-runs/models/smollm2-135m-instruct} # policy before training, and its reference
OUT=${OUT:-runs/lists${SMALL:+-small}}
DTYPE=${DTYPE:-fp32}                              # bf16 where the processor has it

# Sizes: prompts of the splits, answers per prompt (0: all), epochs, seeds of the final runs, the grid. Prompts whose
# rewards differ by SPREAD at most are left out: where the judge likes no answer, which is the best is noise. Of the 333
# prompts with answers of at most 150 words, 274 differ at all and 172 by more than 0.05, of their first 16 answers 153.
if [ "${SMALL:-}" ]; then
  : "${TRAIN:=8}" "${VALID:=4}" "${TEST:=4}" "${ANSWERS:=6}" "${EPOCHS:=1}" "${SEEDS:=1}" "${LRS:=3e-4}" "${BETAS:=0.1}"
fi
: "${TRAIN:=88}" "${VALID:=25}" "${TEST:=40}" "${ANSWERS:=16}" "${SPREAD:=0.05}" "${EPOCHS:=1}" "${SEEDS:=5}"
: "${LRS:=1e-3 3e-3}" "${BETAS:=0.1}" # of LoRA: eleven steps move a policy by 0.1 nats at 3e-4, by 30 at 1e-2
KL=${KL:-15} # nats that a setting may have moved by on the validation winners
mkdir -p "$OUT/tune"
one_choice "$ALPACA$LISTS $MODEL $DTYPE $TRAIN $VALID $TEST $ANSWERS $SPREAD $EPOCHS $LRS $BETAS $KL"
fit=(--max_length=512 --tokens_per_micro_batch=2048 --dtype="$DTYPE")

# 1. The lists, and what wins in them: read this before training.
[ -n "$LISTS" ] || step "$OUT/lists.jsonl" data_prep.py import --source=alpaca-eval --input="$ALPACA" \
  --output="$OUT/lists.jsonl"
LISTS=${LISTS:-$OUT/lists.jsonl}
"$PYTHON" data_prep.py doctor --model="$MODEL" --input="$LISTS" --max_length=512

# 2. Splits by prompts; a held-out prompt gets the pair of RM_DPO, its best answer against a random one.
step "$OUT/test.jsonl" recipes/split_lists.py "$LISTS" "$OUT" "$TRAIN" "$VALID" "$TEST" "$ANSWERS" \
  "$SPREAD"

# 3. The methods: the uniform draw is the control that the paper lacks, and scaled HPS is ours.
names=(DPO-BT DPO-PL-8 DPO-uniform DPO-HPS DPO-HPS-scaled NCA-HPS-N)
options_of() { # NAME: its options of train.py
  case $1 in
    DPO-BT) echo --method=dpo-bt ;;
    DPO-PL-8) echo --method=dpo-pl --pl_responses=8 ;;
    DPO-uniform) echo --method=dpo-uniform ;;
    DPO-HPS) echo --method=dpo-hps ;;
    DPO-HPS-scaled) echo --method=dpo-hps --reward_norm=zscore --reward_scale=0.5 ;;
    NCA-HPS-N) echo --method=nca-hps --n_factor=n_minus_one ;;
  esac
}
trained() { # NAME LR BETA SEED RUN
  # shellcheck disable=SC2046 # options are words
  step "$5/policy" train.py $(options_of "$1") --model="$MODEL" --data="$OUT/train.jsonl" --out="$5" --lr="$2" \
    --beta="$3" --seed="$4" --epochs="$EPOCHS" --prompts_per_step=8 "${fit[@]}" --token_cache="$OUT/token_cache" \
    --reference_cache="$OUT/reference_cache"
}
evaluated() { # MODEL SPLIT FOLDER
  step "$3/eval.json" eval.py --model="$1" --reference="$MODEL" --data="$OUT/$2.jsonl" --out="$3" --samples=0 \
    "${fit[@]}" --reference_cache="$OUT/reference_cache"
}

# 4. beta and lr of each method: the highest RM10 on validation prompts within the budget of KL.
for name in "${names[@]}"; do
  runs=()
  for lr in $LRS; do
    for beta in $BETAS; do
      run=$OUT/tune/$name/lr-$lr,beta-$beta
      trained "$name" "$lr" "$beta" 1000 "$run"
      evaluated "$run/policy" valid "$run/valid"
      runs+=("$run")
    done
  done
  chosen=$("$PYTHON" recipes/best.py rm10 "$KL" "${runs[@]}")
  echo "${chosen##*/}" > "$OUT/tune/$name.chosen"
done

# 5. The chosen setting over seeds that chose nothing, on prompts that chose nothing.
final() { # SEED NAME
  local run=$OUT/$2/run-$1 lr beta
  IFS=, read -r lr beta < "$OUT/tune/$2.chosen"
  trained "$2" "${lr#lr-}" "${beta#beta-}" "$1" "$run"
  evaluated "$run/policy" test "$run/test"
}
evaluated "$MODEL" test "$OUT/reference/run-0/test"
finals() { for name in "${names[@]}"; do final "$1" "$name"; done; } # by seed: what is stopped has whole ones
seeds finals

# 6. What the settings that were not chosen do on the test prompts: a second point for margins at equal KL.
for name in "${names[@]}"; do
  for lr in $LRS; do
    for beta in $BETAS; do
      run=$OUT/tune/$name/lr-$lr,beta-$beta
      [ "${run##*/}" = "$(cat "$OUT/tune/$name.chosen")" ] || evaluated "$run/policy" test "$run/test"
    done
  done
done

# 7. Tables, figures, intervals: over the test prompts, of each the mean over the seeds.
rows=(reference="$OUT/reference")
for name in "${names[@]}"; do rows+=("$name=$OUT/$name"); done
"$PYTHON" -m hps.evaluate.compare "${rows[@]}" --baseline=DPO-HPS --out="$OUT"
"$PYTHON" recipes/equal.py "$OUT" DPO-HPS "${names[@]}"
for name in "${names[@]}"; do echo "$name: $(cat "$OUT/tune/$name.chosen")" >&2; done
