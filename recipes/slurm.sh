#!/usr/bin/env bash
#SBATCH --job-name=hps --nodes=2 --ntasks-per-node=1 --gpus-per-node=4 --cpus-per-task=16 --time=08:00:00
#SBATCH --signal=TERM@120
# A script on several hosts, which share --out, --token_cache and --reference_cache on one disk, and have the same
# environment (`make env`). Under SLURM, from the clone, with sizes as above or on the command line:
#
#     sbatch --nodes=2 recipes/slurm.sh train.py --config configs/llama3-8b.toml --data data/train.jsonl --out runs/8b
#
# Two minutes before its time ends the run gets SIGTERM and writes a checkpoint; the same line goes on from there. And
# by hand, on each of two hosts (0 and 1), where 10.0.0.1 is the first one's address in both:
#
#     HOST=0 FIRST=10.0.0.1 GPUS=4 recipes/slurm.sh two_hosts train.py --config ...
#
# tests/faults/test_hosts.py runs two_hosts in two network namespaces, and cuts the cable. It has not run under SLURM.
set -euo pipefail

two_hosts() { # HOSTS=2 or MIN:MAX, HOST=0..., FIRST=address, GPUS=per host, ADDRESS=own one, where its name is no way to it
  local more=()
  if [[ ${HOSTS:=2} == *:* ]]; then
    more=(--max_restarts=3)
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # see docs/RELIABILITY.md
  fi
  exec ${TORCHRUN:-.venv/bin/torchrun} --nnodes="$HOSTS" --nproc_per_node="${GPUS:-1}" --rdzv_backend=c10d \
    --rdzv_endpoint="$FIRST:${PORT:-29400}" --rdzv_id="${ID:-hps}" --rdzv_conf="is_host=$((HOST == 0))${CONF:+,$CONF}" \
    ${ADDRESS:+--local_addr="$ADDRESS"} ${more[@]+"${more[@]}"} "$@"
}

if [ "${1:-}" = two_hosts ]; then
  "$@"
elif [ -n "${SLURM_PROCID:-}" ] && [ -n "${FIRST:-}" ]; then # a node's task
  HOST=$SLURM_NODEID two_hosts "$@"
else # the job itself, on its first node
  : "${SLURM_JOB_ID:?start it with sbatch, or name two_hosts as its first word}"
  export FIRST HOSTS=$SLURM_JOB_NUM_NODES GPUS=${SLURM_GPUS_ON_NODE:-1} ID=$SLURM_JOB_ID
  FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  exec srun bash recipes/slurm.sh "$@"
fi
