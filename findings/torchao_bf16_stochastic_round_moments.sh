#!/usr/bin/env bash
# torchao's AdamW with bf16_stochastic_round=True rounds the weights stochastically, and AdamW's moments to the nearest.
#
# The moments take the weights' dtype, bfloat16. With beta2 = 0.999 a step changes the second moment by about a
# thousandth, and bfloat16 near 1 has a spacing of 1/128: most changes are lost, only those of large gradients count.
#
# Seen with torchao 0.18.0, torch 2.14.1, on a CPU: gradients from a standard normal distribution, 3000 steps. The second
# moment should be 1 - 0.999^3000 = 0.950. torch's float32 AdamW has 0.950, torchao's has 1.237.
# The class is torchao.optim._AdamW, the one in torchao that keeps no quantized moments.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 torchao==0.18.0 numpy==2.3.5
cat >"$folder/show.py" <<'PYTHON'
import torch
from torchao.optim import _AdamW

STEPS, VALUES, BETAS = 3000, 20_000, (0.9, 0.999)


def second_moment(make_optimizer, dtype):
    weight = torch.nn.Parameter(torch.zeros(VALUES, dtype=dtype))
    optimizer, generator = make_optimizer([weight]), torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        weight.grad = torch.randn(VALUES, generator=generator).to(dtype)
        optimizer.step()
    state = optimizer.state[weight]["exp_avg_sq"]
    print(f"{type(optimizer).__module__}: second moment {state.float().mean():.3f} in {state.dtype}")
    return state.float().mean().item()


expected = 1 - BETAS[1] ** STEPS
print(f"expected: {expected:.3f}")
exact = second_moment(lambda group: torch.optim.AdamW(group, lr=1e-5, betas=BETAS), torch.float32)
rounded = second_moment(
    lambda group: _AdamW(group, lr=1e-5, betas=BETAS, bf16_stochastic_round=True), torch.bfloat16
)
assert abs(exact - expected) < 0.01, exact
assert rounded > 1.2 * expected, f"torchao's moment is {rounded:.3f}: the behaviour changed"
PYTHON
TORCHDYNAMO_DISABLE=1 "$folder/venv/bin/python" "$folder/show.py" 2>/dev/null
