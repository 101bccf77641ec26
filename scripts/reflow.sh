#!/usr/bin/env bash
# The whole chain, safe to repeat: a stage that is sealed says so and is passed over. It ends with the
# seconds that each stage took, of this run alone where an earlier one was cut off.
#
#   scripts/reflow.sh [--dry-run] NAME [STAGE.key=value ...]   e.g. scripts/reflow.sh digits flow.fit.steps=100
#
# NAME is a folder of configs/; STAGE is one of flow pairs features reflow classifier evaluate export
# (features, the classifier that a feature loss looks through, and classifier, the one that scores, where
# NAME has a config for them). --dry-run prints the plan of every stage and stops. Read from the
# environment: PYTHON (default python), ACCELERATE_CONFIG (default: two CPU processes, or one GPU where
# there is one), STAGES (default: all, in order), LAUNCHER (default: accelerate launch with that config),
# PROCESSES (how many the plan counts with; default: num_processes of that config, 1 with a LAUNCHER), and
# ROUNDS (default 1): round k > 1 follows the student of the round before to new pairs, from noise of its
# own, in runs/NAME/pairs_k, and reflows again in reflow_k; evaluate_k and export_k are of the last round.
# A key of pairs or reflow holds for every round, one of pairs_2 for that round alone; but what names a
# folder (run_dir, teacher, start, pairs) is the first round's: later ones follow the round before, and
# take their own from pairs_2.run_dir and the like. What a second round is best made of (README.md):
#
#   ROUNDS=2 scripts/reflow.sh digits "pairs_2.solver={name: ab2, grid: shift, shift: 9, steps: 2}"
set -euo pipefail
cd "$(dirname "$0")/.."

usage="usage: scripts/reflow.sh [--dry-run] NAME [STAGE.key=value ...]; STAGE is one of"
usage+=" flow pairs features reflow classifier evaluate export"
fail() { echo "reflow.sh: $1; $usage" >&2; exit 2; }
rounds=${ROUNDS:-1}
[[ $rounds =~ ^[1-9][0-9]?$ ]] || fail "ROUNDS=$rounds is no number of rounds"
again=
for ((k = 2; k <= rounds; k++)); do again+=" pairs_$k reflow_$k"; done
read -ra stages <<<"${STAGES:-flow pairs features reflow$again classifier evaluate export}"
declare -A module=([flow]=train_flow [pairs]=generate_pairs [features]=train_classifier
                   [reflow]=reflow [classifier]=train_classifier [evaluate]=evaluate [export]=export)
for ((k = 2; k <= rounds; k++)); do
  module[pairs_$k]=generate_pairs
  module[reflow_$k]=reflow
done

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
for stage in features classifier; do
  [ -n "${STAGES:-}" ] || [ -f "configs/$name/$stage.yaml" ] || read -ra stages <<<"${stages[*]/$stage/}"
done
has_config() { # STAGE WORDS: or fail with these words
  [ -f "configs/$name/${1%_*}.yaml" ] || fail "$2: configs/$name/${1%_*}.yaml does not exist"
}
for stage in "${stages[@]}"; do has_config "$stage" "STAGES=${stages[*]}"; done
declare -A keys=()
for word in "$@"; do
  stage=${word%%.*}
  [[ $word == *.*=* && -n ${module[$stage]:-} ]] || fail "$word is not STAGE.key=value"
  has_config "$stage" "$word"
  keys[$stage]+="${word#*.}"$'\n'
done

# What the later rounds put between a stage's keys and their own.
declare -A between=()
value_of() { # STAGE KEY [DEFAULT]: what its keys say, else the default, else its config
  grep "^$2=" <<<"${keys[$1]:-}" | tail -n 1 | cut -d= -f2- | grep . && return
  [ -z "${3:-}" ] || { echo "$3"; return; }
  sed -n "s/^$2: *//p" "configs/$name/$1.yaml" | sed 's/ *#.*//'
}
root=runs/$name
if [ "$rounds" -gt 1 ]; then
  seed=$(value_of pairs seed)
  teacher=$(value_of reflow run_dir)
  for ((k = 2; k <= rounds; k++)); do
    between[pairs_$k]="run_dir=$root/pairs_$k"$'\n'"teacher=$teacher"$'\n'"seed=$((seed + k - 1))"$'\n'
    between[reflow_$k]="run_dir=$root/reflow_$k"$'\n'"start=$teacher"$'\n'
    between[reflow_$k]+="pairs=[{path: $(value_of "pairs_$k" run_dir "$root/pairs_$k")}]"$'\n'
    teacher=$(value_of "reflow_$k" run_dir "$root/reflow_$k")
  done
  between[evaluate]="run_dir=$root/evaluate_$rounds"$'\n'"student=$teacher"$'\n'
  between[export]="run_dir=$root/export_$rounds"$'\n'"student=$teacher"$'\n'
  between[export]+="evaluation=$(value_of evaluate run_dir "$root/evaluate_$rounds")"$'\n'
fi
words_of() { # STAGE: its config and its keys, into `words`
  local first=${1%_*}
  mapfile -t words < <(
    echo "configs/$name/$first.yaml"
    if [ "$first" = "$1" ]; then
      printf '%s' "${between[$1]:-}" "${keys[$1]:-}"
    else
      printf '%s' "${keys[$first]:-}" "${between[$1]}" "${keys[$1]:-}"
    fi
  )
}

python=${PYTHON:-python}
if [ -z "${ACCELERATE_CONFIG:-}" ]; then
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    ACCELERATE_CONFIG=configs/accelerate/one_gpu.yaml
  else
    ACCELERATE_CONFIG=configs/accelerate/cpu_2.yaml
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  fi
fi

# Plan every stage first: a mistake in any config comes to light before the first one works for hours. A
# plan counts the processes that are going to run, and waits for none of them.
processes=${PROCESSES:-}
if [ -z "$processes${LAUNCHER:-}" ]; then
  [ -f "$ACCELERATE_CONFIG" ] || fail "ACCELERATE_CONFIG=$ACCELERATE_CONFIG does not exist"
  processes=$(sed -n 's/^num_processes: *\([0-9]*\).*/\1/p' "$ACCELERATE_CONFIG")
fi
job=()
[ "${processes:-1}" = 1 ] || job=(env RANK=0 LOCAL_RANK=0 "WORLD_SIZE=$processes")
plans=$(mktemp -d)
trap 'rm -rf "$plans"' EXIT
declare -A process=()
for stage in "${stages[@]}"; do
  words_of "$stage"
  "${job[@]}" "$python" -m "pipelines.${module[$stage]}" "${words[@]}" --dry-run >"$plans/$stage" &
  process[$stage]=$!
done
status=0
for stage in "${stages[@]}"; do
  wait "${process[$stage]}" || status=$?
done
[ "$status" -eq 0 ] || exit "$status"
for stage in features classifier; do  # what no stage is going to make would be missed after hours
  [ ! -f "configs/$name/$stage.yaml" ] || continue
  ! grep -h "=runs/$name/$stage does not exist" "$plans"/* >&2 ||
    fail "configs/$name/$stage.yaml does not exist either"
done
if [ -n "$dry_run" ]; then
  for stage in "${stages[@]}"; do cat "$plans/$stage"; done
  exit
fi

launcher=("$python" -m accelerate.commands.launch --config_file "$ACCELERATE_CONFIG")
[ -z "${LAUNCHER:-}" ] || read -ra launcher <<<"$LAUNCHER"
took=
for stage in "${stages[@]}"; do
  if grep -q "is sealed: nothing to do" "$plans/$stage"; then
    cat "$plans/$stage"
    continue
  fi
  words_of "$stage"
  SECONDS=0
  "${launcher[@]}" -m "pipelines.${module[$stage]}" "${words[@]}"
  took+=", $stage $SECONDS"
done
[ -z "$took" ] || echo "reflow.sh: seconds by the clock: ${took#, }"
