"""What a start imports, in a Python of its own: only there nothing is imported yet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LEAN = """
import json, sys
from vl3train.contracts.imports.lean import import_leanly, no_garbage, run_uncompiled
import_leanly()
import_leanly()
with no_garbage():
    import torch, deepspeed, deepspeed.runtime.zero.muon.original_muon
    from transformers import VideoLlama3Config, VideoLlama3ForConditionalGeneration
    from transformers.masking_utils import TransformGetItemToIndex
run_uncompiled()
from torch.utils.checkpoint import checkpoint
from vl3train.engine.optim.skipping_adamw import SkippingAdamW
from vl3train.model.meta_build import MetaBuild
found = {}
config = VideoLlama3Config(
    text_config=dict(model_type="qwen2", vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=2),
    vision_config=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=14),
)
torch.manual_seed(0)
made = VideoLlama3ForConditionalGeneration(config)
with MetaBuild():
    model = VideoLlama3ForConditionalGeneration.from_pretrained(None, config=config, state_dict=made.state_dict())
for (name, one), (_, other) in zip([*made.named_parameters(), *made.named_buffers()],
                                   [*model.named_parameters(), *model.named_buffers()], strict=True):
    assert torch.equal(one, other), name
weight = torch.nn.Parameter(torch.ones(3))
optimizer = SkippingAdamW([weight], lr=0.1, weight_decay=0.0)
checkpoint(torch.square, weight, use_reentrant=False).sum().backward()
optimizer.step()
optimizer.zero_grad()
found["weight"] = weight.tolist()
HEAVY = ["torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp", "sympy", "datasets",
         "wandb", "matplotlib", "sklearn", "pandas", "bitsandbytes", "peft"]
found["heavy"] = [name for name in HEAVY if name in sys.modules]
if "compile" in sys.argv:
    from deepspeed.runtime.zero.muon.original_muon import zeropower_via_newtonschulz5
    with TransformGetItemToIndex():
        pass
    torch._dynamo.reset()
    assert "torch._dynamo" in sys.modules and isinstance(torch._dynamo.config.recompile_limit, int)
    ids = torch.arange(6)[None]
    # transformers' own forward, whose causal mask may be made by vmap
    found["logits"] = list(model(input_ids=ids).logits.shape)
    found["compiled"] = torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist()
print(json.dumps(found))
"""


def lean(*words: str) -> dict[str, object]:
    """What a Python of its own found."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LEAN, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        cwd=Path(__file__).parents[3],
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.two_processes
def test_a_model_is_read_and_trained_without_the_compiler_and_what_it_imports_and_may_ask_for_it_later():
    found = lean("compile")
    assert found["heavy"] == []
    assert found["weight"] == pytest.approx([0.9, 0.9, 0.9], abs=1e-4)
    assert found["logits"] == [1, 6, 64]
    assert found["compiled"] == [2.0, 2.0]
