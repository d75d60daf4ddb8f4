#!/usr/bin/env bash
# torch.compile(dynamic=True) traces a function twice when a custom op in it takes a Python float, a norm's epsilon say.
#
# One would expect one trace: the float is an attribute that never changes. Dynamo takes it as an input of the graph, though
# ("unspecialized float"), traces everything, finds that the op needs its value, throws the trace away and begins again
# with the float as a constant. Nothing is printed, and one graph is counted. torch._dynamo.config.specialize_float=True
# makes it a constant at once.
#
# Seen with torch 2.14.1 on a CPU: the op's fake kernel is called 60 times for ten ops, and 30 times with
# specialize_float. Layers with several such ops took 6 to 7 s of a core to trace, and 2 to 3 with it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.3.5
cat >"$folder/show.py" <<'PYTHON'
import torch
import torch._dynamo.utils

OPS = 10
calls = 0


@torch.library.custom_op("show::scaled_norm", mutates_args=())
def scaled_norm(rows: torch.Tensor, epsilon: float) -> torch.Tensor:
    return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + epsilon)


@scaled_norm.register_fake
def _(rows, epsilon):
    global calls
    calls += 1
    return torch.empty_like(rows)


scaled_norm.register_autograd(lambda ctx, gradient: (gradient, None))


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.epsilon = 1e-6

    def forward(self, rows):
        for _ in range(OPS):
            rows = scaled_norm(torch.nn.functional.gelu(rows), self.epsilon)
        return rows


def fake_calls(specialize_float):
    global calls
    calls = 0
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.config.specialize_float = specialize_float
    compiled = torch.compile(Layer(), dynamic=True, backend="aot_eager")
    compiled(torch.randn(5, 16, requires_grad=True)).sum().backward()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    print(f"specialize_float={specialize_float}: fake kernel called {calls} times, {graphs} graph")
    assert graphs == 1, graphs
    return calls


once = fake_calls(True)
twice = fake_calls(False)
assert twice == 2 * once, f"{twice} calls, and {once} with specialize_float: the behaviour changed"
PYTHON
"$folder/venv/bin/python" "$folder/show.py" 2>/dev/null
