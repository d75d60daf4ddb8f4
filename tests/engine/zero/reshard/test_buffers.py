"""State that was saved in any layout is, in any other, what a run of that layout would have saved: to the bit."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from vl3train.engine.zero.reshard.buffers import own_buffers, problems
from vl3train.engine.zero.reshard.layouts import Layout, buffer_size
from vl3train.engine.zero.reshard.shards import MASTER, Shards

LAYOUTS = [Layout(dp_size=ranks, zero_stage=stage) for ranks in (1, 2, 3, 4, 16) for stage in range(4)]

DTYPES = {
    "float32": (torch.float32, {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}),
    "stochastic": (torch.bfloat16, {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}),
    "split": (
        torch.bfloat16,
        {"exp_avg": torch.float32, "exp_avg_sq": torch.float32, "low_bits": torch.int16},
    ),
}


def straight_state(rng, dtypes):
    """Groups of parameters, the smallest smaller than the ranks are many; each with its master and its state."""
    shapes = [
        [tuple(rng.randint(1, 9) for _ in range(rng.randint(1, 2))) for _ in range(rng.randint(1, 5))]
        for _ in range(rng.randint(1, 3))
    ]
    shapes[0] = [(1,)]
    master, of_state = dtypes
    return [
        {
            f"{number}.{index}": {
                what: (torch.randn(shape) * 100).to(dtype)
                for what, dtype in {MASTER: master, **of_state}.items()
            }
            for index, shape in enumerate(group)
        }
        for number, group in enumerate(shapes)
    ]


def divided(group, what, layout, rank):
    """DeepSpeed's division of a group, written again: pad with zeros, cut, lay end to end."""

    def share(flat, multiple):
        flat = torch.cat([flat, flat.new_zeros(-len(flat) % multiple)])
        return flat.chunk(layout.dp_size)[rank]

    flats = [parts[what].reshape(-1) for parts in group.values()]
    if layout.zero_stage == 3:
        return torch.cat([share(flat, layout.dp_size) for flat in flats])
    return share(torch.cat(flats), 2 * layout.dp_size)


def buffers(groups, layout, rank):
    """What AdamW has on a rank."""
    if layout.zero_stage == 0:
        return [parts for group in groups for parts in group.values()]
    return [
        {what: divided(group, what, layout, rank) for what in next(iter(group.values()))} for group in groups
    ]


def write(folder, groups, layout, step):
    """A folder of files as DeepSpeed writes them."""
    folder.mkdir(parents=True)
    shapes = [{name: parts[MASTER].shape for name, parts in group.items()} for group in groups]
    weights = {name: parts[MASTER] for group in groups for name, parts in group.items()}
    for rank in range(layout.num_shards):
        own = buffers(groups, layout, rank)
        steps = {} if step is None else {"step": step}
        base = {
            "state": {
                number: {**steps, **{what: value for what, value in parts.items() if what != MASTER}}
                for number, parts in enumerate(own)
            },
            "param_groups": [{"params": [number]} for number in range(len(own))],
        }
        masters = [parts[MASTER] for parts in own]
        model = {"module": weights, "param_shapes": shapes if layout.zero_stage else None}
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        if layout.zero_stage == 0:
            model["optimizer"] = base
        elif layout.zero_stage == 3:
            held = {"optimizer_state_dict": base, "fp32_flat_groups": masters}
            torch.save({"optimizer_state_dict": held}, folder / f"{name}_optim_states.pt")
        else:
            held = {"base_optimizer_state": base, "single_partition_of_fp32_groups": masters}
            torch.save({"optimizer_state_dict": held}, folder / f"bf16_{name}_optim_states.pt")
        of_rank = name if layout.zero_stage == 3 else "mp_rank_00"
        torch.save(model, folder / f"{of_rank}_model_states.pt")


def counts(groups):
    return [{name: parts[MASTER].numel() for name, parts in group.items()} for group in groups]


@pytest.mark.parametrize("kind", DTYPES)
def test_any_layout_comes_out_of_any_other(tmp_path, kind):
    rng = random.Random(kind)
    torch.manual_seed(len(kind))
    for number, (saved, now) in enumerate(rng.sample(list(itertools.permutations(LAYOUTS, 2)), 40)):
        groups = straight_state(rng, DTYPES[kind])
        step = rng.choice([7, torch.tensor(7.0)])
        write(tmp_path / str(number), groups, saved, step)
        shards = Shards(tmp_path / str(number), saved, counts(groups))
        assert problems(shards, now, counts(groups)) == []
        for rank in range(now.dp_size):
            found = own_buffers(shards, now, counts(groups), rank)
            for own, wanted in zip(found, buffers(groups, now, rank), strict=True):
                assert float(own.pop("step")) == 7
                assert own.keys() == wanted.keys()
                for what, value in wanted.items():
                    assert own[what].dtype == value.dtype
                    assert torch.equal(own[what], value.reshape(-1)), (saved, now, rank, what)


def test_before_the_first_step_there_are_masters_and_no_moments(tmp_path):
    groups = [{"a": {MASTER: torch.arange(5.0)}}]
    write(tmp_path / "state", groups, Layout(dp_size=2, zero_stage=1), None)
    shards = Shards(tmp_path / "state", Layout(dp_size=2, zero_stage=1), counts(groups))
    [own] = own_buffers(shards, Layout(dp_size=1, zero_stage=2), counts(groups), 0)
    assert own.keys() == {MASTER}
    assert own[MASTER].tolist() == [0, 1, 2, 3, 4, 0], "and one of padding"


def test_a_rank_touches_only_the_files_that_hold_its_share(tmp_path):
    saved, now = Layout(dp_size=4, zero_stage=1), Layout(dp_size=2, zero_stage=1)
    groups = [{"a": {MASTER: torch.arange(64.0)}}]
    write(tmp_path / "state", groups, saved, 1)
    for rank in (2, 3):
        (tmp_path / "state" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").unlink()
    [own] = own_buffers(Shards(tmp_path / "state", saved, counts(groups)), now, counts(groups), 0)
    assert own[MASTER].tolist() == list(range(32))


def test_parameters_and_counts_that_do_not_fit_are_all_told(tmp_path):
    saved, now = Layout(dp_size=1, zero_stage=0), Layout(dp_size=1, zero_stage=1)
    groups = [{"a": {MASTER: torch.zeros(4)}, "b": {MASTER: torch.zeros(2)}}]
    write(tmp_path / "state", groups, saved, 3)
    file = tmp_path / "state" / "mp_rank_00_model_states.pt"
    held = torch.load(file, weights_only=True)
    held["optimizer"]["state"][1]["step"] = 2
    torch.save(held, file)
    text = "\n".join(problems(Shards(tmp_path / "state", saved, counts(groups)), now, counts(groups)))
    assert "b has had 2 updates, and a 3: under machine.zero_stage=1 they would share one count" in text
    assert "Go on with machine.dp_size=1 machine.zero_stage=0, or start a new run" in text
    write(tmp_path / "other", groups, now, 3)
    lines = problems(Shards(tmp_path / "other", now, []), saved, [{"a": 5, "c": 1}])
    assert lines[1:4] == [
        "a: the checkpoint trains 4 values of it, this run 5 values of it",
        "b: the checkpoint trains 2 values of it, this run no values of it",
        "c: the checkpoint trains no values of it, this run 1 values of it",
    ]


def test_files_of_another_size_than_their_layout_says_are_not_read(tmp_path):
    groups = [{"a": {MASTER: torch.zeros(9), "exp_avg": torch.zeros(9)}}]
    write(tmp_path / "state", groups, Layout(dp_size=2, zero_stage=1), 1)
    shards = Shards(tmp_path / "state", Layout(dp_size=4, zero_stage=1), counts(groups))
    assert buffer_size(shards.layout, counts(groups)[0]) == 4
    with pytest.raises(AssertionError, match="rank 0 has 6 values of exp_avg, not 4"):
        shards.buffer(0, 0)
