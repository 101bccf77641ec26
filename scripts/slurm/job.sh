#!/usr/bin/env bash
#SBATCH --job-name=reflow
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
# One SLURM job: `flowmatch run` on what was allotted; saved and queued again when its time runs out.
#
#   sbatch --gpus-per-node=1 --time=8:00:00 scripts/slurm/job.sh NAME [--only A,B] [SECTION.key=value ...]
#
# Submit it from the root of the checkout, its environment activated. ACCELERATE_CONFIG and PYTHON are
# those of node.sh. SIGTERM, 120 seconds before the end or at preemption, goes
# to the whole chain: the stage saves, the job is queued again, and repeating its command resumes.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
[ -f scripts/slurm/node.sh ] || { echo "job.sh: submit from the root of the checkout" >&2; exit 2; }

launcher=scripts/slurm/node.sh
processes=$((${SLURM_NNODES:-1} * ${SLURM_GPUS_ON_NODE:-1}))
[ "${SLURM_NNODES:-1}" -eq 1 ] || launcher="srun --ntasks-per-node=1 --kill-on-bad-exit $launcher"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100  # else the launcher kills what still saves after 30 seconds

preempted=''
chain=''
# shellcheck disable=SC2317  # called by the trap
stop() {
  preempted=1
  [ -n "$chain" ] || return 0
  if [ "${SLURM_NNODES:-1}" -eq 1 ]; then
    kill -TERM -- "-$chain" 2>/dev/null
  else  # srun would answer with SIGKILL to all; its steps take the signal themselves
    kill -USR2 "$chain" 2>/dev/null  # no stage after this one
    scancel --signal=TERM "$SLURM_JOB_ID"
  fi
}
trap stop TERM
set -m  # the chain gets a process group of its own, which is what is signalled
"${PYTHON:-python}" -m flowmatch run "$@" --launcher "$launcher" --processes "$processes" &
chain=$!
wait "$chain" && status=0 || status=$?
if [ -n "$preempted" ]; then  # that wait was cut short; a stage saves after the script above it has gone
  while kill -0 -- "-$chain" 2>/dev/null; do sleep 1; done
  wait "$chain" 2>/dev/null && ended=0 || ended=$?
  [ "$ended" -eq 127 ] || status=$ended
fi

# A launcher turns the stage's 75 into 1: after SIGTERM anything but success means "not finished".
if [ "$status" -eq 75 ] || { [ -n "$preempted" ] && [ "$status" -ne 0 ]; }; then
  # by its number an array's last member would requeue them all
  id=$SLURM_JOB_ID
  [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  echo "job.sh: preempted, job $id is queued again"
  scontrol requeue "$id"
  exit 75
fi
exit "$status"
