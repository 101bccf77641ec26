#!/usr/bin/env bash
# The chain as dependent SLURM jobs: those of `flowmatch run`, pairs by an array of workers.
#
#   scripts/slurm/chain.sh NAME [--rounds N] [SECTION.key=value ...]
#
# Each job starts when the one before has ended well. Read from the environment: PROCESSES (that the plan
# counts, default 1; fit.shard=true needs it), WORKERS (members of an array, default 4), TRAIN, PAIRS and
# CHECK (words for sbatch of the training jobs, of an array's member, and of the rest), and sbatch's own,
# such as SBATCH_ACCOUNT, SBATCH_PARTITION:
#
#   TRAIN="--nodes=2 --gpus-per-node=8" PROCESSES=16 PAIRS="--gpus-per-node=1" WORKERS=16 \
#     scripts/slurm/chain.sh NAME
set -euo pipefail
cd "$(dirname "$0")/../.."
flowmatch=("${PYTHON:-python}" -m flowmatch)

# A mistake in any section comes to light before a job waits in the queue.
"${flowmatch[@]}" run "$@" --dry-run --launcher scripts/slurm/node.sh --processes "${PROCESSES:-1}"
mapfile -t sections < <("${flowmatch[@]}" run "$@" --list)

last=
for section in "${sections[@]}"; do
  case $section in
    flow | reflow | reflow_*) words=${TRAIN:-} ;;
    pairs | pairs_*) words="--array=0-$((${WORKERS:-4} - 1)) ${PAIRS:-}" ;;
    *) words=${CHECK:-} ;;
  esac
  read -ra words <<<"$words"
  [ -z "$last" ] || words+=("--dependency=afterok:$last")
  last=$(sbatch --parsable --job-name="$1-$section" "${words[@]}" scripts/slurm/job.sh "$@" --only "$section")
  last=${last%%;*}  # --parsable adds the cluster's name where there are several
  echo "chain.sh: $section is job $last"
done
