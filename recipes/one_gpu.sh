#!/usr/bin/env bash
# recipes/paper.sh on one GPU of 24 to 80 GB, meant for about an hour (not timed yet): a small instruct model answers,
# learns and is its own reference, DPO only, 1,000 prompts of each set with 32 candidates.
#
#     recipes/one_gpu.sh                    with vLLM for the candidates; ENGINE=hf without it
#     MODEL=HuggingFaceTB/SmolLM2-1.7B-Instruct PROMPTS=500 recipes/one_gpu.sh
#
# ArmoRM in bf16 takes 15 GB by itself, which is why it comes to the GPU only when the reference has left it.
set -euo pipefail

export MODEL=${MODEL:-Qwen/Qwen2.5-0.5B-Instruct} PROMPTS=${PROMPTS:-1000} GPUS=${GPUS:-1} OUT=${OUT:-runs/one-gpu}
export SAMPLER=${SAMPLER:-$MODEL} SKYWORK=${SKYWORK:-Skywork/Skywork-Reward-V2-Qwen3-0.6B}
export LOSSES=${LOSSES:-dpo} N=${N:-32} NS=${NS:-5} BETAS=${BETAS:-0.5} TEST=${TEST:-200} SAMPLES=${SAMPLES:-5}
export NEW_TOKENS=${NEW_TOKENS:-256} LENGTH=${LENGTH:-1024} STEP=${STEP:-32} TOKENS=${TOKENS:-8192} LR=${LR:-1e-4}
exec "$(dirname "$0")/paper.sh"
