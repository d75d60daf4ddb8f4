#!/usr/bin/env bash
# Trains one stage on several nodes under Slurm: one torchrun on each node; the first node is the meeting point.
#
#   sbatch --nodes 2 --gpus-per-node 8 scripts/launch_slurm.sh stage=2 model=7b machine=multi_node \
#     stage.init_from=runs/7b/1_encoder_adaptation run.stop_after_steps=2000
#
# Submit the same line again to resume: a run found in run.output_dir continues. The folder must be on a file system
# that all nodes share.
#SBATCH --job-name=vl3train
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --output=%x-%j.log
set -euo pipefail

: "${SLURM_JOB_NODELIST:?start this with sbatch}"
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
gpus=${SLURM_GPUS_ON_NODE:?ask for GPUs with --gpus-per-node}
port=$((20000 + SLURM_JOB_ID % 20000))

srun --kill-on-bad-exit=1 python -m torch.distributed.run \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$gpus" \
  --rdzv-backend c10d --rdzv-endpoint "$host:$port" --rdzv-id "$SLURM_JOB_ID" \
  -m vl3train.train "$@"
