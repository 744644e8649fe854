#!/bin/bash
# Train on 2 machines with 8 GPUs each; requeued and resumed exactly when it is pre-empted or runs out of time.
#
#   sbatch scripts/slurm_train.sh --config scripts/configs/resnet50_a2_300ep.yaml --data-dir imagenet --output outputs/a2
#
# The output directory must be on a file system that all machines share.
#SBATCH --job-name=fdconv
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@180
# 180 s before the end Slurm sends SIGTERM to this shell. It passes it on to torchrun on each machine, torchrun to its
# processes; they finish their update, save and leave; then the job goes back into the queue.

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=4

srun torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc_per_node="$SLURM_GPUS_ON_NODE" \
    --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_backend=c10d \
    --rdzv_endpoint="$head_node:29500" \
    scripts/train.py "$@" --resume --save-every-steps 1000 &
run=$!

trap 'kill -TERM "$run"; wait "$run"; scontrol requeue "$SLURM_JOB_ID"' TERM
wait "$run"
