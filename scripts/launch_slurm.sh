#!/usr/bin/env bash
# Trains one stage on several nodes under Slurm: one launcher on each node; the first node is the meeting point.
#
#   sbatch --nodes 2 --gpus-per-node 8 --time 24:00:00 scripts/launch_slurm.sh stage=2 model=7b machine=multi_node \
#     run.output_dir=runs/7b/2_alignment stage.init_from=runs/7b/1_encoder_adaptation
#
# Ten minutes before the time limit Slurm sends SIGUSR1: the run saves at the end of its step and stops, and this script
# puts the job into the queue again. A preempted job (SIGTERM) does the same, where the partition leaves it the time
# (GraceTime). The run goes on from its checkpoint. The output folder must be on a file system that all nodes share.
#SBATCH --job-name=vl3train
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@600
set -euo pipefail

: "${SLURM_JOB_NODELIST:?start this with sbatch}"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
host=${hosts%%$'\n'*} # not by head: with pipefail its early end may end this script
gpus=${SLURM_GPUS_ON_NODE:?ask for GPUs with --gpus-per-node}
port=$((20000 + SLURM_JOB_ID % 20000))
stopped=$PWD/.vl3train-stopped-$SLURM_JOB_ID
rm -f "$stopped"

# Slurm's signals reach the shell of each task too. With a trap it waits for the launcher, which gets them as well.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
  trap : TERM USR1
  stopped=$1
  shift
  "$@" || code=$?
  if [ "${code:-0}" -eq 75 ]; then touch "$stopped"; exit 0; fi
  exit "${code:-0}"' task "$stopped" \
  python -m vl3train.launch \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$gpus" \
  --rdzv-backend c10d --rdzv-endpoint "$host:$port" --rdzv-id "$SLURM_JOB_ID" \
  -m vl3train.train "$@"

if [ -e "$stopped" ]; then # exit code 75: saved, and not finished
  rm -f "$stopped"
  scontrol requeue "$SLURM_JOB_ID"
fi
