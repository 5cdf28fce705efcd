#!/usr/bin/env bash
# The paper's experiments with its own models and sizes (Sec. 6, Appendix D): `make paper`, or
#
#     MODEL=RLHFlow/LLaMA3-SFT-v2 PROMPTS=10000 GPUS=4 OUT=runs/paper recipes/paper.sh
#
# HH-RLHF and PKU-SafeRLHF -> 100 candidates per prompt -> Skywork's rewards -> 15 methods on each set -> ArmoRM's
# reward of samples, margins, BLEU -> the other set (transfer) -> n -> beta -> tables. PLAN=1 prints memory, tokens and
# hours of every stage, and ends (recipes/estimate.py takes other GPUs and lengths too). The same command again goes on
# where it was stopped. PYTHON=echo prints the commands.
# recipes/one_gpu.sh is this on one GPU; TINY=1 is this with random models, in minutes without a GPU.
#
# The names are those of the paper and its code (whose config says Llama3-SFT-v2.0-epoch3); none of these models has
# been run with this code. The paper does not say how many prompts it took, how long a sample may be, or which of PKU's
# labels is its pair; and its learning rate moves nothing (LR).
set -euo pipefail

cd "$(dirname "$0")/.."
. recipes/stages.sh
PYTHON=${PYTHON:-python}

# Three variables size it. The rest has the paper's values.
MODEL=${MODEL:-RLHFlow/LLaMA3-SFT-v2} # policy before training, and its reference
PROMPTS=${PROMPTS:-10000}             # training prompts of each data set
GPUS=${GPUS:-4}                       # of this machine; weights are sharded over them where they must be

OUT=${OUT:-runs/paper}
if [ "${TINY:-}" ]; then # a minute of processor: every line, no result
  OUT=${OUT%/}-tiny PROMPTS=8 GPUS=1
  tiny=$OUT/models
  step "$tiny/pku-saferlhf.jsonl" recipes/tiny_models.py "$tiny"
  MODEL=$tiny/policy SAMPLER=$tiny/policy SKYWORK=$tiny/skywork ARMORM=$tiny/armorm
  HH=$tiny/hh-rlhf.jsonl PKU=$tiny/pku-saferlhf.jsonl
  TEST=4 N=4 NS="2" BETAS="0.5" SAMPLES=2 NEW_TOKENS=24 LENGTH=256 LR=1e-3 EPOCHS=1 STEP=4 DTYPE=fp32 ENGINE=hf PL=3
fi
SAMPLER=${SAMPLER:-RLHFlow/Llama3-v2-iterative-DPO-iter3}     # who answers
SKYWORK=${SKYWORK:-Skywork/Skywork-Reward-Llama-3.1-8B-v0.2}  # rewards to train on
ARMORM=${ARMORM:-RLHFlow/ArmoRM-Llama3-8B-v0.1}               # rewards to report
OBJECTIVES=${OBJECTIVES:-score}                               # of that one: its gate's; one, for a plain classifier
HH=${HH:-Anthropic/hh-rlhf}                                   # a data set of the hub, or .jsonl(.gz) of its rows
PKU=${PKU:-PKU-Alignment/PKU-SafeRLHF}
: "${TEST:=1000}" "${N:=100}" "${NS:=5 20 50}" "${BETAS:=0.25 0.5 0.75 1.0}" "${SAMPLES:=5}" "${NEW_TOKENS:=512}"
: "${LOSSES:=dpo exo ipo sppo nca}" "${LENGTH:=2048}" "${EPOCHS:=2}" "${STEP:=64}" "${SEEDS:=1}" "${DTYPE:=bf16}"
: "${ENGINE:=vllm}" # hf where it is not installed: slower by far
: "${ROWS:=64}"     # sequences decoded at once; more take less time, while the GPU's memory lasts
: "${PL:=8}"        # ranks that PL sees; the paper's 100 cost it 2.7 times the hours of the others
# The paper says 5e-7. AdamW moves a weight by about lr a step at most, and LoRA's second matrix begins at zero: after
# 312 steps of a cosine at 5e-7 its entries are 8e-5 at most, which changes next to nothing. LR=5e-7 gives the paper's.
: "${LR:=1e-5}"
fit=(--max_length="$LENGTH" --tokens_per_micro_batch="${TOKENS:-4096}" --dtype="$DTYPE")
caches=(--reference_cache="$OUT/reference_cache")

[ -z "${PLAN:-}" ] || exec "$PYTHON" -m recipes.estimate --recipe=recipes/paper.sh
one_choice "$MODEL $PROMPTS $SAMPLER $SKYWORK $ARMORM $OBJECTIVES $HH $PKU $TEST $N $SAMPLES $NEW_TOKENS $LENGTH" \
  "$EPOCHS $STEP $DTYPE $PL $LR"

# 1. Prompts with a human pair. Of a data set its own test split, of a file the rows behind those of training.
label=(--source=hh-rlhf)
rows_of hh-train "$HH" train 0 "$PROMPTS" "${label[@]}"
rows_of hh-test "$HH" test "$PROMPTS" "$TEST" "${label[@]}"
label=(--source=pku-saferlhf --order=safe)
rows_of pku-train "$PKU" train 0 "$PROMPTS" "${label[@]}"
rows_of pku-test "$PKU" test "$PROMPTS" "$TEST" "${label[@]}"

# 2. Candidates and their rewards; `annotate` says how often these agree with people, `doctor` what wins.
how=(spread) decoder=(--engine=hf --max_rows="$ROWS")
[ "$ENGINE" = hf ] || { how=(step) decoder=(--engine="$ENGINE" --tensor_parallel="$GPUS"); } # one process on all GPUs
for split in hh-train hh-test pku-train pku-test; do
  "${how[@]}" "$OUT/$split-candidates.jsonl" data_prep.py generate --model="$SAMPLER" --input="$OUT/$split.jsonl" \
    --output="$OUT/$split-candidates.jsonl" --n="$N" --temperature=0.9 --max_new_tokens="$NEW_TOKENS" \
    --max_prompt_length=$((LENGTH - NEW_TOKENS)) --dtype="$DTYPE" "${decoder[@]}"
  spread "$OUT/$split-scored.jsonl" data_prep.py annotate --scorer="$SKYWORK" --dtype="$DTYPE" \
    --input="$OUT/$split-candidates.jsonl" --output="$OUT/$split-scored.jsonl"
done
for name in hh pku; do
  "$PYTHON" data_prep.py doctor --model="$MODEL" --input="$OUT/$name-train-scored.jsonl" --max_length="$LENGTH" \
    --test="$OUT/$name-test.jsonl"
done

# 3. Training and evaluation, row by row. SFT is the row that win rates are against.
train() { # SEED SET ROW OPTIONS OF THE METHOD...: OUT/ROW/run-SEED/policy
  spread "$OUT/$3/run-$1/policy" train.py "${@:4}" --model="$MODEL" --data="$OUT/$2-train-scored.jsonl" \
    --out="$OUT/$3/run-$1" --lr="$LR" --epochs="$EPOCHS" --prompts_per_step="$STEP" --seed="$1" \
    --gradient_checkpointing=true --token_cache="$OUT/token_cache" "${fit[@]}" "${caches[@]}"
}
test_on() { # SET MODEL FOLDER MORE...: on the set's test prompts
  spread "$3/eval.json" eval.py --model="$2" --reference="$MODEL" --data="$OUT/$1-test-scored.jsonl" --out="$3" \
    --samples="$SAMPLES" --temperature=0.9 --max_new_tokens="$NEW_TOKENS" --max_rows="$ROWS" --scorer="$ARMORM" \
    --objectives="$OBJECTIVES" --scorer_dtype="$DTYPE" "${fit[@]}" "${caches[@]}" "${@:4}"
}
declare -A rows # of each table, by name
tested() { # SEED SET ROW TABLE: the policy of OUT/ROW on a set, as a row of OUT/TABLE
  [ "$1" -gt 0 ] || rows[$4]+=" $(basename "$3")"
  test_on "$2" "$OUT/$3/run-$1/policy" "$OUT/$4/$(basename "$3")/run-$1/test" --baseline="$OUT/$2/SFT/run-0/test"
}
row() { # SEED SET ROW OPTIONS...: trained and tested on one set
  train "$@"
  tested "$1" "$2" "$3" "$(dirname "$3")"
}
also() { # TABLE ROW NAME: a row that another table has already
  rows[$1]+=" $3"
  mkdir -p "$OUT/$1"
  ln -sfn "$(realpath "$OUT")/$2" "$OUT/$1/$3"
}

# Table 2: five losses by three views, fine-tuned on each set.
for name in hh pku; do
  rows[$name]=SFT
  test_on "$name" "$MODEL" "$OUT/$name/SFT/run-0/test"
  for loss in $LOSSES; do
    for view in bt pl hps; do
      more=()
      [ "$view" != pl ] || more=(--pl_responses="$PL")
      method=$loss-$view
      seeds row "$name" "$name/${method^^}" --method="$method" "${more[@]}"
    done
  done
done

# Table 5: trained on one set, tested on the other.
for loss in $LOSSES; do
  for view in BT PL HPS; do
    seeds tested pku "hh/${loss^^}-$view" hh-to-pku
    seeds tested hh "pku/${loss^^}-$view" pku-to-hh
  done
done
also hh-to-pku pku/SFT SFT
also pku-to-hh hh/SFT SFT

# Tables 6 and 7: the first n responses of a prompt, of which two are the human pair; on the set that was trained on, and
# on the other.
for view in bt hps; do
  for n in $NS; do
    seeds row hh "n/DPO-${view^^}-$n" --method="dpo-$view" --candidates="$n"
    seeds tested pku "n/DPO-${view^^}-$n" n-to-pku
  done
  also n "hh/DPO-${view^^}" "DPO-${view^^}-$N"
  also n-to-pku "hh-to-pku/DPO-${view^^}" "DPO-${view^^}-$N"
done

# Table 8: beta, which is 0.1 above.
for beta in $BETAS; do seeds row hh "beta/DPO-HPS-$beta" --method=dpo-hps --beta="$beta"; done
also beta hh/DPO-HPS DPO-HPS-0.1

# 4. Tables with intervals over prompts, paired differences, figures, and a page to read all samples on: OUT/TABLE.
compare() { # TABLE BASELINE
  local words=() name
  for name in ${rows[$1]}; do words+=("$name=$OUT/$1/$name"); done
  "$PYTHON" -m hps.evaluate.compare "${words[@]}" --baseline="$2" --out="$OUT/$1"
}
for table in hh pku hh-to-pku pku-to-hh; do compare "$table" DPO-HPS; done
for table in n n-to-pku; do compare "$table" "DPO-HPS-$N"; done
compare beta DPO-HPS-0.1
