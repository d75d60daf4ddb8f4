"""What a host cannot hold is refused before anything lies there, with the figures and the way out."""

from __future__ import annotations

import pytest

from tests.engine.test_host_adamw import SIZES, go_on, optimizer_of, parameters_on
from tests.engine.test_memory import counted, engine_of, pack, peak_of, states_to_come
from tests.model.conftest import make_model
from vl3train.config.choices import Recompute
from vl3train.config.schema import MachineConfig
from vl3train.engine import host_memory
from vl3train.engine.host_memory import available_bytes, require
from vl3train.engine.memory import Fitting, fit_memory
from vl3train.engine.ranks import RunError, join
from vl3train.model.recomputation import Levels


@pytest.fixture(scope="module")
def rank():
    return join(MachineConfig())


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MEMINFO = "MemTotal:  4000 kB\nMemFree:  100 kB\nMemAvailable:  2000 kB\n"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 2_048_000),
        (  # version 2: the group itself has no limit, the one around it has
            {
                "proc/self/cgroup": "0::/job/task\n",
                "sys/fs/cgroup/job/task/memory.max": "max\n",
                "sys/fs/cgroup/job/task/memory.current": "10\n",
                "sys/fs/cgroup/job/memory.max": "1000000\n",
                "sys/fs/cgroup/job/memory.current": "400000\n",
                "sys/fs/cgroup/job/memory.stat": "anon 300000\ninactive_file 50000\n",
            },
            650_000,
        ),
        (  # version 1, seen from inside a container: the path is that of the host
            {
                "proc/self/cgroup": "3:cpuset:/\n2:cpu,memory:/docker/abc\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "900000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "100000\n",
                "sys/fs/cgroup/memory/memory.stat": "inactive_file 5\ntotal_inactive_file 100\n",
            },
            800_100,
        ),
        (  # a limit above what the machine has
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "9223372036854771712\n",
                "sys/fs/cgroup/memory.current": "400000\n",
            },
            2_048_000,
        ),
    ],
    ids=["no group", "version 2", "version 1", "no real limit"],
)
def test_what_is_free_is_the_least_of_machine_and_control_groups(tmp_path, files, free):
    write(tmp_path, {"proc/meminfo": MEMINFO, **files})
    assert available_bytes(tmp_path) == free


def test_this_machine_tells_something_and_one_without_proc_nothing(tmp_path):
    assert available_bytes() > 2**28
    assert available_bytes(tmp_path) is None


@pytest.mark.parametrize(("ranks", "refused"), [(2, False), (3, True)])
def test_all_ranks_of_a_host_are_counted(rank, monkeypatch, ranks, refused):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 5 * 2**30)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    if not refused:
        return require(rank, 2 * 2**30, what="means", way_out="do without")
    with pytest.raises(
        RunError, match=r"means take 6\.0 GiB .* \(2\.0 GiB .* 3 ranks\), and 5\.0 .*: do without"
    ):
        require(rank, 2 * 2**30, what="means", way_out="do without")


def test_means_count_until_they_are_there():
    parameters = parameters_on()
    optimizer = optimizer_of(parameters, True)
    assert optimizer.host_bytes_to_come() == 8 * sum(SIZES) == optimizer.num_bytes()
    go_on(parameters, optimizer, range(3))
    assert optimizer.host_bytes_to_come() == 8 * SIZES[1], "one never had a gradient"


@pytest.fixture(scope="module")
def small(rank):
    """An engine, its worst pack, and what that takes with every layer's input on the host."""
    engine, packed = engine_of(rank, make_model(layers=4), zero_stage=0)
    batch = pack(3, 300)
    packed.choose_levels = lambda *_: Levels((Recompute.offload,) * 4, (Recompute.offload,) * 4)
    peak_of(engine, batch)  # makes the gradients, which stay
    return engine, packed, batch, peak_of(engine, batch) + states_to_come(packed)


def fit(small, more, said):
    engine, packed, batch, least = small
    with counted(engine, batch, least + more) as memory:
        return fit_memory(engine, packed, batch, memory, pack_name="the worst pack", say=said.append)


def test_a_pack_whose_inputs_the_host_cannot_hold_is_refused_before_they_are_sent_there(small, monkeypatch):
    free = 10**6
    monkeypatch.setattr(host_memory, "available_bytes", lambda: free)
    found = fit(small, 10_000, []).levels
    assert Recompute.offload in found.vision
    free, said = 1000, []
    with pytest.raises(
        RunError, match=r"the worst pack needs the inputs .* the host\. These take .*max_tokens"
    ):
        fit(small, 10_000, said)
    assert not any("offload" in line for line in said)


def test_what_a_dry_run_took_of_the_host_is_not_asked_for_again(small, monkeypatch):
    engine, packed, batch, _ = small
    with counted(engine, batch, 10**11) as memory:
        fitting = Fitting(engine, packed, batch, memory, "the worst pack", lambda _: None)
        size, widths = fitting.size, fitting.row_bytes
        free = size.patches * sum(widths.vision) + size.tokens * sum(widths.language)
        monkeypatch.setattr(host_memory, "available_bytes", lambda: free)
        all_offloaded = fitting._all_at(Recompute.offload)
        assert fitting._dry_run(all_offloaded) is not None
        free = 0  # torch keeps what it page-locked
        assert fitting._dry_run(all_offloaded) is not None
        assert fitting._dry_run(all_offloaded._replace(vision=(Recompute.layer,) * 4)) is not None


def test_a_pack_that_exceeds_the_limit_with_all_inputs_on_the_host_is_refused_too(small):
    """The device still holds it, but not beside the states that the first step makes."""
    said = []
    with pytest.raises(RunError, match=r"the worst pack does not fit, .* GiB were taken at the peak"):
        fit(small, -1000, said)
    assert any("offload" in line for line in said)
    assert "does not fit" not in said[-1]
