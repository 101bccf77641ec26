#!/usr/bin/env bash
# On each machine of a SLURM job, once: Accelerate's launcher with the numbers that SLURM knows.
#
#   srun --ntasks-per-node=1 scripts/slurm/node.sh -m pipelines.train_flow CONFIG.yaml [key=value ...]
#
# One process a GPU, one a machine where there is none. Read from the environment: PYTHON (default
# python), ACCELERATE_CONFIG (default: the file of configs/accelerate/ for that many processes).
set -euo pipefail

nodes=${SLURM_NNODES:-1}
processes=$((nodes * ${SLURM_GPUS_ON_NODE:-1}))
config=configs/accelerate/one_node.yaml
[ "$nodes" -eq 1 ] || config=configs/accelerate/two_nodes.yaml
[ "$processes" -gt 1 ] || config=configs/accelerate/one_gpu.yaml
where=(--num_processes "$processes")
if [ "$nodes" -gt 1 ]; then
  mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  where+=(--num_machines "$nodes" --machine_rank "$SLURM_NODEID" --main_process_ip "${names[0]}")
fi
exec "${PYTHON:-python}" -m accelerate.commands.launch \
  --config_file "${ACCELERATE_CONFIG:-$config}" "${where[@]}" "$@"
