"""Rows of the GPU benchmark do on a CPU, on two layers, what they do on a GPU."""

from __future__ import annotations

import json
import sys
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import one_gpu, profile
from benchmarks.data.drawn_shards import WORDS, sample_members, write_tokenizer
from benchmarks.data.packs import TINY, draw_packs, draw_sample, pack_batch
from benchmarks.gpu import measure as gpu_measure
from benchmarks.gpu.command import measure_command
from benchmarks.gpu.measure import measure, prepare, shares, sustained_matmul
from benchmarks.gpu.model import build_model
from benchmarks.gpu.rows import ROWS, tiny
from benchmarks.gpu.stock import packed_inputs, padded_inputs, set_varlen_attention
from benchmarks.kernels.gemms import main as products_main
from benchmarks.kernels.host_syncs import SYNC_WARNING, count_syncs
from benchmarks.kernels.kinds import kind_of, union_seconds
from vl3train.contracts.records import RenderSettings
from vl3train.contracts.tokens import IGNORE_INDEX
from vl3train.data.media.clips import DecodeLimits
from vl3train.data.render.chat_tokens import ChatTokenizer
from vl3train.data.render.samples import render_sample

CPU = torch.device("cpu")


def first_losses(name, steps=3):
    row = tiny(ROWS[name])
    step, work = prepare(row, 0, CPU)
    return [step(work.data(0), work.steps[0]["supervised"]) for _ in range(steps)]


def test_all_ways_train_the_same_samples_and_the_plain_loop_is_the_engine_without_deepspeed():
    engine = first_losses("2b_states_on_gpu")
    for name in ("stock_2b", "2b_position_ids", "2b_position_ids_vision_again"):
        assert first_losses(name, 1)[0] == pytest.approx(engine[0], abs=2e-3), name
    # Bit for bit, so that what is between their times is DeepSpeed's.
    assert first_losses("2b_plain_loop") == engine
    assert first_losses("2b") == engine  # the means wait on the host
    # Masters are split: ties of weights alone are rounded otherwise.
    assert first_losses("7b_one_gpu") == pytest.approx(engine, abs=1e-4)


def test_samples_on_one_row_do_not_see_each_other():
    """Nor does a frame another: transformers' own hidden states, packed and one sample at a time."""
    hf_model = build_model("tiny", CPU, torch.float32).eval()
    with torch.no_grad():  # weights as drawn attend to everything alike, and a leak would not show
        for name, weight in hf_model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.mul_(8)
    samples = [sample for pack in draw_packs(4, max_tokens=512, mix=TINY) for sample in pack]
    assert {sample.key for sample in samples} == {"drawn/text", "drawn/image", "drawn/clip"}

    def states(inputs):
        inputs.pop("labels")
        return hf_model.model(**inputs).last_hidden_state[0]

    clip_id = TINY.video_pad_id
    with torch.no_grad():
        alone = torch.cat([states(padded_inputs([sample], CPU, clip_id)) for sample in samples])
        set_varlen_attention(hf_model, CPU)
        together = states(packed_inputs(samples, CPU, clip_id))
    assert torch.allclose(alone, together, atol=1e-4)


@pytest.mark.parametrize("left", [0, 1, 2, 100])
def test_a_filled_pack_has_its_last_token(left):
    drawn = [len(sample.input_ids) for pack in draw_packs(1, max_tokens=512, mix=TINY) for sample in pack]
    filled = draw_packs(3, max_tokens=sum(drawn) + left, mix=TINY, fill=True)
    assert [sum(len(sample.input_ids) for sample in pack) for pack in filled] == [sum(drawn) + left] * 3
    assert [len(sample.input_ids) for sample in filled[0]][: len(drawn)] == drawn
    texts = [pack[-1] for pack in filled if pack[-1].key == "drawn/text"]
    for text in texts:
        assert (text.labels != IGNORE_INDEX).sum() == len(text.input_ids) // 2
    assert pack_batch(filled[0]).num_planned_tokens == sum(drawn) + left
    assert tiny(ROWS["longest_2b"]).fill


@pytest.mark.parametrize("name", ["2b_states_on_gpu", "stock_2b", "2b_position_ids"])
def test_no_step_has_packs_of_another(name):
    row = tiny(ROWS[name])
    _, work = prepare(row, 0, CPU)
    samples = [
        {sample.input_ids.tobytes() for pack in step["packs"] for sample in pack} for step in work.steps
    ]
    assert len(samples) == row.steps + 2
    assert len(set.union(*samples)) == sum(len(of_step) for of_step in samples) > len(samples)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_stock_row_can_do_without_cudnns_attention():
    prepare(tiny(ROWS["stock_2b_no_cudnn"]), 0, CPU)
    try:
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_a_ratio_to_stock_is_to_its_best_row():
    done = {"2b": {"tflops": 400.0}, "stock_2b": {"tflops": 50.0}}
    (shipped,) = one_gpu.compared(done)
    assert (shipped["figure"], shipped["value"]) == ("ratio_to_stock_2b_as_shipped", 8.0)
    best, shipped = one_gpu.compared(done | {"stock_2b_no_cudnn": {"tflops": 100.0}})
    assert (best["figure"], best["value"]) == ("ratio_to_stock_2b", 4.0)
    assert best["note"] == "useful TFLOP/s of 2b over stock_2b_no_cudnn, same run"
    assert shipped["value"] == 8.0


def test_figures_of_a_row(monkeypatch):
    counts = iter([7, 20, 31, 33, 38, 44])  # before the first step, and after each
    monkeypatch.setattr(gpu_measure, "memory_mappings", lambda _: next(counts))
    found = measure("2b_liger", tiny(ROWS["2b_liger"]), 0, CPU)
    assert len(found["step_seconds"]) == tiny(ROWS["2b_liger"]).steps
    seconds, rates = found["step_seconds"], found["step_tflops"]
    work = sum(took * rate for took, rate in zip(seconds, rates, strict=True))
    assert work / sum(seconds) == pytest.approx(found["tflops"])
    assert found["step_mappings"] == [2, 5, 6][: len(seconds)]
    of_packs = found["work_a_pack_tflop"] / found["seconds_a_pack"]
    assert found["tflops"] == pytest.approx(of_packs)
    lines = list(one_gpu.figure_lines("2b_liger", ROWS["2b_liger"], found))
    assert [line["figure"] for line in lines] == [
        "tflops_2b_liger",
        "tokens_a_pack_2b_liger",
        "recompiles_2b_liger",
        "graph_breaks_2b_liger",
    ]
    assert found["kernels"] == {}, "transformers' own"


def test_a_row_says_whose_kernels_it_ran_and_whether_layers_were_compiled_whole():
    found = measure("2b_given", tiny(ROWS["2b_given"]), 0, CPU)
    assert found["kernels"] == {"attention": "reference", "gemm_backend": "torch"}
    assert found["graph_breaks"] == 0


def test_packs_are_shared_equally_and_evenly():
    costs = np.random.default_rng(0).integers(200, 300, 8).tolist()
    found = shares(costs, 2)
    assert sorted(found[0] + found[1]) == list(range(8))
    assert len(found[0]) == len(found[1]) == 4
    loads = [sum(costs[i] for i in mine) for mine in found]
    assert max(loads) / min(loads) < 1.05


@pytest.mark.two_processes
@pytest.mark.long
def test_two_ranks_by_the_command_and_a_tiny_run_keeps_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["one_gpu", "--tiny", "--rows", "7b"])
    one_gpu.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert lines[0]["figure"] == "tflops_7b"
    assert lines[0]["value"] > 0
    assert lines[0]["settings"]["ranks"] == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_the_train_command_is_timed_on_drawn_shards_and_told_as_it_goes(capfd):
    row = replace(tiny(ROWS["2b_train_command"]), steps=2)
    told = []
    found = measure_command(row, CPU, told.append)
    assert [len(so_far["step_seconds"]) for so_far in told] == [1, 2]
    assert told[-1] == found
    assert "step 1" in capfd.readouterr().out  # what the run says
    assert found["tflops"] > 0
    assert found["skipped_samples"] == 0
    assert 0 <= found["data_wait_fraction"] < 1
    assert sum(found["step_seconds"]) == pytest.approx(found["seconds_a_pack"] * row.packs_a_step * 2)
    assert len(found["step_tflops"]) == 2
    assert found["recompiles"] == 0


def test_drawn_shards_have_the_sizes_of_drawn_packs(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = ChatTokenizer.from_folder(tmp_path)
    settings = RenderSettings(
        image_merge_size=2,
        video_merge_size=2,
        prune_frames=False,
        fps=1.0,
        min_frames=1,
        max_frames=180,
        image_min_pixels=3136,
        image_max_pixels=3211264,
        video_min_pixels=3136,
        video_max_pixels=12845056,
        max_visual_tokens=10240,
        tokenizer=tokenizer.fingerprint,
    )
    limits = DecodeLimits(max_pixels=10**8, max_seconds=100)
    rng = np.random.default_rng(1)
    kinds = set()
    for _ in range(20):
        drawn = draw_sample(rng, image_merge_size=2, max_tokens=400, mix=TINY)
        members = sample_members(drawn, rng)
        conversation = members.pop("json")
        found = render_sample(conversation, members, settings, tokenizer, limits, key="k", planned=None)
        assert found.grids.tolist() == drawn.grids.tolist()
        # ChatML's own tokens and the times of frames come on top.
        assert 0 <= len(found.input_ids) - len(drawn.input_ids) < 30 + 15 * drawn.grids[:, 0].sum()
        # The end mark, and a first word that has no space before it.
        assert 1 <= (found.labels != IGNORE_INDEX).sum() - (drawn.labels != IGNORE_INDEX).sum() <= 3
        kinds.add(drawn.key)
    assert kinds == {"drawn/text", "drawn/image", "drawn/clip"}
    assert len(set(WORDS)) == len(WORDS)


def test_waits_are_counted_by_their_line():
    def act():
        for _ in range(3):
            warnings.warn(f"{SYNC_WARNING} (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    found = count_syncs(act)
    assert sum(found.values()) == 3
    assert torch.cuda.synchronize.__module__ == "torch.cuda", "it was watched only meanwhile"
    (where,) = found
    assert "benchmarks/test_rows.py" in where
    assert "SYNC_WARNING" in where


def test_time_is_summed_by_kind_without_counting_twice():
    a, norm = torch.randn(300, 300), torch.nn.LayerNorm(300)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        for _ in range(20):
            norm(a @ a)
        wall = time.perf_counter() - started
    events = [
        {"ph": "X", "cat": "cpu_op", "tid": e.thread, "name": e.name, "ts": e.time_range.start}
        | {"dur": e.time_range.end - e.time_range.start}
        for e in profiler.events()
    ]
    found = profile.summary(events, wall)
    assert found["kinds"]["matrix products"]["calls"] == 20
    assert found["kinds"]["norms"]["seconds"] > 0
    assert 0 < found["kernel_seconds"] <= wall
    assert found["idle_seconds"] is None


def test_idle_is_what_no_kernel_covers():
    kernels = [("nvjet_tst_128x256", 0, 60), ("flash_fwd_kernel", 50, 20), ("odd_one", 90, 10)]
    events = [{"ph": "X", "cat": "kernel", "name": n, "ts": t, "dur": d} for n, t, d in kernels]
    found = profile.summary(events, 1e-4)
    assert found["idle_seconds"] == pytest.approx(20e-6)
    assert found["unmatched_share"] == pytest.approx(10 / 90)
    assert [one["name"] for one in found["unmatched"]] == ["odd_one"]
    assert "| idle: no kernel runs | 0.0 | 20.0% | |" in profile.markdown({"row": "2b", "packs": 2, **found})
    assert union_seconds([]) == 0
    assert kind_of("triton_red_fused__to_copy_native_layer_norm_backward_5") == "norms"


def test_products_are_timed_side_by_side(capsys):
    products_main(["--tiny"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows[1:]] == ["encoder"] * 4 + ["2B"] * 6 + ["7B"] * 6
    assert all(float(time) > 0 for row in rows[1:] for time in row[2:])


def test_a_lasting_product_is_what_the_card_has_come_down_to(monkeypatch):
    seconds = iter([0, 1, 1, 2, 2, 6, 6, 8])  # turns of 1, 1, 4 and 2 s
    monkeypatch.setattr(gpu_measure.time, "perf_counter", lambda: next(seconds))
    work = 3 * 2 * 16**3 / 1e12
    found = sustained_matmul(torch.device("cpu"), size=16, turns=4, num_matmuls=3)
    assert found == pytest.approx((work / 4 + work / 2) / 2)
