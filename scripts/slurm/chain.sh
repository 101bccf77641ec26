#!/usr/bin/env bash
# The chain as dependent SLURM jobs: those of scripts/reflow.sh, pairs by an array of workers.
#
#   scripts/slurm/chain.sh NAME [STAGE.key=value ...]
#
# Each job starts when the one before has ended well. Read from the environment: ROUNDS (as by
# scripts/reflow.sh), PROCESSES (that it plans with, default 1; fit.shard=true needs it), WORKERS (members
# of an array, default 4), TRAIN, PAIRS and CHECK (words for sbatch of the training jobs, of an array's
# member, and of the rest), and sbatch's own, such as SBATCH_ACCOUNT, SBATCH_PARTITION:
#
#   TRAIN="--nodes=2 --gpus-per-node=8" PROCESSES=16 PAIRS="--gpus-per-node=1" WORKERS=16 \
#     scripts/slurm/chain.sh NAME
set -euo pipefail
cd "$(dirname "$0")/../.."

# A mistake in any config comes to light before a job waits in the queue.
LAUNCHER=scripts/slurm/job.sh scripts/reflow.sh --dry-run "$@"

last=
submit() { # STAGE WORDS-FOR-SBATCH KEYS...: queue one stage behind the one before
  local stage=$1 words
  read -ra words <<<"$2"
  shift 2
  [ -z "$last" ] || words+=("--dependency=afterok:$last")
  last=$(sbatch --parsable --job-name="$name-$stage" --export="ALL,STAGES=$stage" "${words[@]}" \
    scripts/slurm/job.sh "$@")
  last=${last%%;*}  # --parsable adds the cluster's name where there are several
  echo "chain.sh: $stage is job $last"
}

name=$1
submit flow "${TRAIN:-}" "$@"
submit pairs "--array=0-$((${WORKERS:-4} - 1)) ${PAIRS:-}" "$@"
[ ! -f "configs/$name/features.yaml" ] || submit features "${CHECK:-}" "$@"
submit reflow "${TRAIN:-}" "$@"
for ((k = 2; k <= ${ROUNDS:-1}; k++)); do
  submit "pairs_$k" "--array=0-$((${WORKERS:-4} - 1)) ${PAIRS:-}" "$@"
  submit "reflow_$k" "${TRAIN:-}" "$@"
done
[ ! -f "configs/$name/classifier.yaml" ] || submit classifier "${CHECK:-}" "$@"
submit evaluate "${CHECK:-}" "$@"
submit export "${CHECK:-}" "$@"
