# Functions that the recipes share; sourced, not run. They want PYTHON (PYTHON=echo prints the commands), OUT, SEEDS,
# and GPUS where there are several.

step() { # PRODUCT COMMAND...: runs it unless its product is there, which every command writes last and whole
  local product=$1
  shift
  [ -e "$product" ] || "$PYTHON" "$@"
}

spread() { # PRODUCT SCRIPT...: the same on all GPUs of this machine
  local product=$1
  shift
  if [ "${GPUS:-1}" -gt 1 ]; then
    step "$product" -m torch.distributed.run --standalone --nproc_per_node="$GPUS" -- "$@"
  else
    step "$product" "$@"
  fi
}

one_choice() { # SETTINGS: products are kept, so one folder serves one choice of data and sizes
  mkdir -p "$OUT"
  if [ -f "$OUT/settings" ] && [ "$(cat "$OUT/settings")" != "$*" ]; then
    echo "$OUT holds a run with other data or sizes ($(cat "$OUT/settings")): choose another OUT, or remove it" >&2
    exit 1
  fi
  echo "$*" > "$OUT/settings"
}

rows_of() { # NAME INPUT SPLIT SKIP LIMIT OPTIONS...: OUT/NAME.jsonl, of a data set's split or, behind SKIP rows, a file
  local cut=(--split="$3" --limit="$5")
  [[ $2 != *.jsonl* ]] || cut=(--skip="$4" --limit="$5")
  step "$OUT/$1.jsonl" data_prep.py import --input="$2" --output="$OUT/$1.jsonl" "${cut[@]}" "${@:6}"
}

seeds() { # FUNCTION ARGUMENTS...: calls it once per seed, which is its first argument
  local seed
  for ((seed = 0; seed < SEEDS; seed++)); do "$1" "$seed" "${@:2}"; done
}
