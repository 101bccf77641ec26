#!/usr/bin/env bash
# The whole chain, safe to repeat: a stage that is sealed says so and is passed over.
#
#   scripts/reflow.sh [--dry-run] NAME [STAGE.key=value ...]   e.g. scripts/reflow.sh digits flow.fit.steps=100
#
# NAME is a folder of configs/; STAGE is one of flow pairs reflow classifier evaluate export (classifier
# where NAME has a config for it). --dry-run prints the plan of every stage and stops. Read from the
# environment: PYTHON (default python), ACCELERATE_CONFIG (default: two CPU processes, or one GPU where
# there is one), STAGES (default: all, in order), and LAUNCHER (default: accelerate launch with that
# config).
set -euo pipefail
cd "$(dirname "$0")/.."

read -ra stages <<<"${STAGES:-flow pairs reflow classifier evaluate export}"
declare -A module=([flow]=train_flow [pairs]=generate_pairs [reflow]=reflow
                   [classifier]=train_classifier [evaluate]=evaluate [export]=export)
usage="usage: scripts/reflow.sh [--dry-run] NAME [STAGE.key=value ...]; STAGE is one of"
usage+=" flow pairs reflow classifier evaluate export"
fail() { echo "reflow.sh: $1; $usage" >&2; exit 2; }

for stage in "${stages[@]}"; do
  [ -n "${module[$stage]:-}" ] || fail "STAGES=${stages[*]}: there is no stage $stage"
done
dry_run=
if [ "${1:-}" = --dry-run ]; then
  dry_run=1
  shift
fi
[ $# -gt 0 ] || fail "no NAME"
name=$1
shift
[ -d "configs/$name" ] || fail "configs/$name does not exist"
if [ ! -f "configs/$name/classifier.yaml" ]; then
  unset 'module[classifier]'
  read -ra stages <<<"${stages[*]/classifier/}"
fi
declare -A keys=()
for word in "$@"; do
  stage=${word%%.*}
  [[ $word == *.*=* && -n ${module[$stage]:-} ]] || fail "$word is not STAGE.key=value"
  keys[$stage]+="${word#*.}"$'\n'
done

python=${PYTHON:-python}
if [ -z "${ACCELERATE_CONFIG:-}" ]; then
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    ACCELERATE_CONFIG=configs/accelerate/one_gpu.yaml
  else
    ACCELERATE_CONFIG=configs/accelerate/cpu_2.yaml
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  fi
fi

# Plan every stage first: a mistake in any config comes to light before the first one works for hours.
plans=$(mktemp -d)
trap 'rm -rf "$plans"' EXIT
declare -A process=()
for stage in "${stages[@]}"; do
  mapfile -t words < <(echo "configs/$name/$stage.yaml"; printf '%s' "${keys[$stage]:-}")
  "$python" -m "pipelines.${module[$stage]}" "${words[@]}" --dry-run >"$plans/$stage" &
  process[$stage]=$!
done
status=0
for stage in "${stages[@]}"; do
  wait "${process[$stage]}" || status=$?
done
[ "$status" -eq 0 ] || exit "$status"
if [ -n "$dry_run" ]; then
  for stage in "${stages[@]}"; do cat "$plans/$stage"; done
  exit
fi

launcher=("$python" -m accelerate.commands.launch --config_file "$ACCELERATE_CONFIG")
[ -z "${LAUNCHER:-}" ] || read -ra launcher <<<"$LAUNCHER"
for stage in "${stages[@]}"; do
  if grep -q "is sealed: nothing to do" "$plans/$stage"; then
    cat "$plans/$stage"
    continue
  fi
  mapfile -t words < <(echo "configs/$name/$stage.yaml"; printf '%s' "${keys[$stage]:-}")
  "${launcher[@]}" -m "pipelines.${module[$stage]}" "${words[@]}"
done
