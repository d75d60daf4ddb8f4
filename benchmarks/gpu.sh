#!/usr/bin/env bash
# All that only a GPU can show, what tells most first. Figures go to benchmarks/results, or to $OUT.
#
#   bash benchmarks/gpu.sh                  # everything: about an hour on one H100; rows of two GPUs say so where there is one
#   bash benchmarks/gpu.sh check rows       # some of it, in this order
#
#   check    attention kernels against float64, then the tests marked gpu
#   rows     useful TFLOP/s of the 2B, its longest pack, 7B with LoRA, beside transformers
#   command  the train command with machine=one_h100 on the demo
#   curves   200 steps of loss beside transformers, with the GPU's kernels
#   profile  where the time of a step goes
#   sweep    settings of the norm kernels
set -uo pipefail
cd "$(dirname "$0")/.."
logs=${OUT:-$(mktemp -d)}
failed=()

run() { # name, command...
  local name=$1 begin=$SECONDS
  shift
  echo "== $name: $*"
  if "$@" 2>&1 | tee "$logs/$name.log"; then echo "== $name: $((SECONDS - begin)) s"; else failed+=("$name"); fi
}

for part in "${@:-check rows command curves profile sweep}"; do
  for one in $part; do
    case $one in
      check)
        run kernels python -m vl3train.cli.main kernels --check
        run tests python -m pytest -q -m gpu -p no:cacheprovider
        ;;
      rows) run rows python -m benchmarks.one_gpu ;;
      command)
        demo=$(mktemp -d)
        run demo python -m vl3train.cli.main demo "$demo" --samples-scale 0.05
        run command python -m vl3train.train stage=1 model=debug data=demo machine=one_h100 data.root="$demo" \
          run.output_dir="$demo/run" run.num_steps=8
        ;;
      curves) run curves python -m benchmarks.loss_curves ;;
      profile) run profile python -m benchmarks.profile ;;
      sweep) run sweep python -m benchmarks.kernels.norms --sweep ;;
      *)
        echo "no part '$one'; see the head of this file" >&2
        exit 2
        ;;
    esac
  done
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}; see their logs in $logs" >&2
  exit 1
fi
