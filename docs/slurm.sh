#!/usr/bin/env bash
# Train on several nodes under Slurm; torchrun starts one rank for each GPU:
#
#   sbatch docs/slurm.sh --preset imagenet256-xl --data LATENTS --out runs/xl
#
# From the root of the repository, which all nodes share, as they do LATENTS and runs/.  Before its time is over the job
# saves and queues itself again; the run continues from its checkpoint.
#SBATCH --job-name=fastasync
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export PATH="$PWD/.venv/bin:$PATH"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300 # seconds that torchrun leaves the ranks for saving

stopping= step=
trap 'stopping=1; kill -TERM "$step" 2>/dev/null || true' TERM

# since Slurm 22.05 srun does not take over what sbatch was given here
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="${hosts%%$'\n'*}:${PORT:-29500}" \
    train.py "$@" &
step=$!

status=0
wait "$step" || status=$?
if [ -n "$stopping" ]; then
    wait "$step" || status=$? # the first one was ended by the signal
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
