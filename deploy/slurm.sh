#!/bin/bash
# One run on the nodes of a Slurm job, a rank a GPU:
#
#     sbatch --nodes 16 deploy/slurm.sh v3_16b /shared/runs/v3_16b --set parallel.ep_size=8
#
# RECIPE, the run's folder (which all nodes must see), then what else `abyssal train` takes. From the environment:
#     GPUS_PER_NODE  ranks of a node                                              8
#     MIN_NODES      with how few nodes the run goes on when others are lost      as many as the job has
#     MAX_RESTARTS   how often torchrun starts the ranks of a node again          100
#     CONTAINER      a prefix for the command, such as "apptainer exec --nv abyssal.sif"
# A job that Slurm puts into its queue again, or that runs into its time limit, keeps its number, and by that number the
# run is known: it goes on from its newest training state. A run that another job began goes on with --resume.

#SBATCH --job-name=abyssal
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --no-kill
#SBATCH --signal=B:USR1@120

set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: sbatch --nodes N $0 RECIPE RUN_FOLDER [options of abyssal train]" >&2
  exit 2
fi
recipe=$1 folder=$2
shift 2

: "${SLURM_JOB_ID:?start this with sbatch}" "${SLURM_JOB_NUM_NODES:?start this with sbatch}"
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${nodes%%$'\n'*}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

# In the background, so that the signal before the time limit is met at once: the queue's next turn goes on with the run.
trap 'echo "time is nearly up: back into the queue" >&2; scontrol requeue "$SLURM_JOB_ID"' USR1
# shellcheck disable=SC2086  # CONTAINER is words
srun --no-kill --kill-on-bad-exit=0 ${CONTAINER:-} torchrun \
  --nnodes "${MIN_NODES:-$SLURM_JOB_NUM_NODES}:$SLURM_JOB_NUM_NODES" \
  --nproc-per-node "${GPUS_PER_NODE:-8}" \
  --rdzv-backend c10d \
  --rdzv-endpoint "$first:${RDZV_PORT:-29400}" \
  --rdzv-id "$SLURM_JOB_ID" \
  --max-restarts "${MAX_RESTARTS:-100}" \
  -m abyssal train "$recipe" --out "$folder" "$@" &
ranks=$!
until wait "$ranks"; do
  code=$?
  kill -0 "$ranks" 2>/dev/null || exit "$code" # else it was the signal that ended the wait
done
