#!/usr/bin/env bash
# Trains stages 1 to 4, each from the one before. Run it again: it skips finished stages and resumes a stopped one.
#
#   bash scripts/train_all_stages.sh [options] [key=value ...]
#
#   --model NAME     debug, 2b or 7b                   (default: 2b)
#   --data NAME      a file of configs/data            (default: published)
#   --machine NAME   a file of configs/machine         (default: one_node; cpu where there is no GPU)
#   --out DIR        the stages' output folders        (default: runs/MODEL)
#   --nproc N        processes on this node            (default: the number of GPUs, else 2)
#   --from N         first stage; set where it starts with N:stage.init_from=DIR   (default: 1)
#   key=value        an option for every stage
#   N:key=value      an option for stage N only, as in 3:step.max_tokens=8192
#
# LAUNCH="torchrun ..." replaces the launcher, for several nodes (scripts/launch_slurm.sh).
set -euo pipefail

model=2b data=published machine="" out="" nproc="" first=1 words=()
while [ $# -gt 0 ]; do
  case "$1" in
    --model) model=$2; shift 2 ;;
    --data) data=$2; shift 2 ;;
    --machine) machine=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --nproc) nproc=$2; shift 2 ;;
    --from) first=$2; shift 2 ;;
    -h | --help) sed -n '2,15p' "$0" | cut -c3-; exit 0 ;;
    -*) echo "unknown option $1; --help lists them" >&2; exit 2 ;;
    *) words+=("$1"); shift ;;
  esac
done
out=${out:-runs/$model}
if [ -z "$nproc" ] || [ -z "$machine" ]; then
  gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
  nproc=${nproc:-$([ "$gpus" -gt 0 ] && echo "$gpus" || echo 2)}
  machine=${machine:-$([ "$gpus" -gt 0 ] && echo one_node || echo cpu)}
fi
launch=${LAUNCH:-python -m vl3train.launch --standalone --nproc-per-node $nproc}
names=(1_encoder_adaptation 2_alignment 3_multitask_finetuning 4_video_finetuning)

# Print the options of stage $1, one on each line.
options_of() {
  local number=$1 word
  printf '%s\n' "stage=${names[number - 1]}" "model=$model" "data=$data" "machine=$machine" \
    "run.output_dir=$out/${names[number - 1]}"
  if [ "$number" -gt 1 ]; then printf '%s\n' "stage.init_from=$out/${names[number - 2]}"; fi
  for word in ${words[@]+"${words[@]}"}; do
    case "$word" in
      "$number":*) printf '%s\n' "${word#*:}" ;;
      [1-4]:*) ;;
      *) printf '%s\n' "$word" ;;
    esac
  done
}

# Check all four first: a mistake in stage 4 must not show only after stage 3.
for number in $(seq "$first" 4); do
  mapfile -t options < <(options_of "$number")
  ahead=$([ "$number" -gt "$first" ] && echo --ahead || true)
  if [ -z "${LAUNCH:-}" ]; then options=("machine.dp_size=$nproc" "${options[@]}"); fi
  # shellcheck disable=SC2086
  if ! checked=$(python -m vl3train.cli.main check $ahead "${options[@]}" 2>&1); then
    printf 'stage %s: %s\n' "$number" "$checked" >&2
    exit 1
  fi
done

for number in $(seq "$first" 4); do
  mapfile -t options < <(options_of "$number")
  printf '\n== stage %s of 4: %s\n' "$number" "$launch -m vl3train.train ${options[*]}"
  # $launch holds a command and its arguments
  # shellcheck disable=SC2086
  $launch -m vl3train.train "${options[@]}" || {
    code=$?
    if [ "$code" -eq 75 ]; then
      printf '\nstage %s was asked to stop and has saved: the same command goes on from there\n' "$number" >&2
    fi
    exit "$code"
  }
done
printf '\nThe four stages are in %s; the last one is %s\n' "$out" "$out/${names[3]}"
