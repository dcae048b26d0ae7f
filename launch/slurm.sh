#!/bin/bash
# Two machines of eight GPUs each:  sbatch launch/slurm.sh recipes/qwen_qlora.yaml
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300   # five minutes before the end a checkpoint is saved; the same command goes on from it
set -euo pipefail
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 8 --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d \
    --rdzv_endpoint "$head_node:29500" run_sft.py "$@" &
trap 'kill -TERM %1; wait %1' TERM
wait %1
