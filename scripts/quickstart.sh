#!/usr/bin/env bash
# Trains the debug model of VideoLLaMA3 through all four stages on generated pictures, clips and text, and asks it
# questions. It takes minutes on two cores. Run it again: it resumes, or reports what is already finished.
#
#   bash scripts/quickstart.sh [--out DIR] [--nproc N] [--fast]
#
#   --out DIR    where everything goes (default: quickstart)
#   --nproc N    processes, 1 or 2 (default: 2; 1 on a machine with one GPU)
#   --fast       two steps for each stage, to see that everything runs: the model learns nothing
set -euo pipefail
cd "$(dirname "$0")/.."

out=quickstart nproc="" fast=""
while [ $# -gt 0 ]; do
  case "$1" in
    --out) out=$2; shift 2 ;;
    --nproc) nproc=$2; shift 2 ;;
    --fast) fast=1; shift ;;
    -h | --help) sed -n '2,9p' "$0" | cut -c3-; exit 0 ;;
    *) echo "unknown option $1; --help lists them" >&2; exit 2 ;;
  esac
done

started=$SECONDS
say() { printf '\n[%d:%02d] %s\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$*"; }

if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
  if [ ! -x .venv/bin/python ]; then
    say "making .venv (no environment is active)"
    "${PYTHON:-python3}" -m venv .venv
  fi
  # shellcheck disable=SC1091
  source .venv/bin/activate
fi
if ! python -c 'from importlib.util import find_spec; import sys; sys.exit(not all(map(find_spec, sys.argv[1:])))' \
  vl3train deepspeed transformers; then
  say "installing vl3train and what it needs (torch is large: some minutes)"
  python -m pip install -e .
fi
installed=$SECONDS

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -eq 0 ]; then export DS_ACCELERATOR=cpu; fi # else each DeepSpeed process warns that it guessed cpu
# Two at most: a step of the demo is two packs.
if [ -z "$nproc" ]; then nproc=$([ "$gpus" -eq 1 ] && echo 1 || echo 2); fi
machine=$([ "$gpus" -gt 0 ] && echo one_gpu || echo cpu)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

say "demo data and parts in $out/data"
vl3train demo "$out/data" ${fast:+--samples-scale 0.02}

overrides=()
if [ -n "$fast" ]; then overrides+=(run.num_steps=2); fi
say "four stages of the debug model, $nproc processes ($machine)"
bash scripts/train_all_stages.sh --model debug --data demo --machine "$machine" --out "$out/runs" --nproc "$nproc" \
  data.root="$out/data" 1:run.evaluate_at_start=true ${overrides[@]+"${overrides[@]}"}

export_dir=$out/export
last=$(ls -d "$out"/runs/*4_video_finetuning)
if [ -d "$export_dir" ]; then
  say "the export exists in $export_dir"
else
  say "export to Hugging Face form: $export_dir"
  vl3train export "$last" "$export_dir"
fi

if [ -f "$out/answers.jsonl" ]; then
  say "the answers exist in $out/answers.jsonl"
else
  say "held-out questions to the exported model"
  vl3train generate --model "$export_dir" --batch "$out/data/questions.jsonl" --media-root "$out/data" \
    --out "$out/answers.jsonl" --max-new-tokens 24
fi

say "report"
vl3train report "$out"/runs/* --answers "$out/answers.jsonl" --expected "$out/data/expected.jsonl" --out "$out/report"

say "done in $(((SECONDS - installed) / 60)) min $(((SECONDS - installed) % 60)) s after installation"
echo "report:  $out/report/report.html"
echo "model:   $export_dir"
echo "ask it:  vl3train generate --model $export_dir --image PICTURE --prompt 'What shape is it?'"
