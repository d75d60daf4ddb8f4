"""What a host cannot hold is refused before anything lies there, with the figures and the way out."""

from __future__ import annotations

import pytest

from tests.engine.memory.test_fit import counted, engine_of, pack, peak_of, states_to_come
from tests.engine.optim.test_offload_adamw import SIZES, go_on, optimizer_of, parameters_on
from tests.model.conftest import make_model
from vl3train.config.choices import Recompute
from vl3train.config.schema import MachineConfig
from vl3train.engine.memory import host as memory_host
from vl3train.engine.memory.fit import Fitting, fit_memory
from vl3train.engine.memory.host import free_in_groups, free_of_machine, require
from vl3train.engine.ranks import RunError, join
from vl3train.model.activations.work import uniform_plan


@pytest.fixture(scope="module")
def rank():
    return join(MachineConfig())


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
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
    ],
    ids=["no group", "version 2", "version 1"],
)
def test_the_tightest_limit_of_the_control_groups_counts(tmp_path, files, free):
    write(tmp_path, files)
    assert free_in_groups(tmp_path) == free


def test_this_machine_knows_what_is_free_and_one_without_proc_does_not(tmp_path):
    assert free_of_machine() > 2**28
    assert free_of_machine(tmp_path) is None
    write(tmp_path, {"proc/meminfo": "MemTotal:  4000 kB\nMemFree:  100 kB\nMemAvailable:  2000 kB\n"})
    assert free_of_machine(tmp_path) == 2_048_000


def host_has(monkeypatch, *, limit=None, free=None):
    monkeypatch.setattr(memory_host, "free_in_groups", lambda: limit)
    monkeypatch.setattr(memory_host, "free_of_machine", lambda: free)


@pytest.mark.parametrize(("ranks", "refused"), [(2, False), (3, True)])
def test_all_ranks_of_a_host_are_counted(rank, monkeypatch, ranks, refused):
    host_has(monkeypatch, limit=5 * 2**30, free=2**40)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    said = []
    need = {"what": "moments", "way_out": "do without", "say": said.append}
    if refused:
        with pytest.raises(
            RunError, match=r"moments need 6\.0 GiB .* \(2\.0 GiB .* 3 ranks\), and 5\.0 .*: do without"
        ):
            require(rank, 2 * 2**30, **need)
    else:
        require(rank, 2 * 2**30, **need)
    assert said == []


def test_what_seems_too_much_for_the_machine_is_warned_of_and_tried(rank, monkeypatch):
    """A virtual machine may be given more memory as it uses it, and what caches hold may come back."""
    host_has(monkeypatch, free=2**30)
    said = []
    require(rank, 2 * 2**30, what="moments", way_out="do without", say=said.append)
    (line,) = said
    assert line.startswith("moments need 2.0 GiB")
    assert line.endswith("1.0 GiB seem to be free. If the system kills the run for its memory, do without")
    require(rank, 2 * 2**30, what="moments", way_out="do without", say=said.append, already=2**30)
    assert len(said) == 1


def test_moments_count_until_they_are_there():
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
    plan = uniform_plan(Recompute.offload, Recompute.offload, (4, 4))
    peak_of(engine, batch, plan)  # makes the gradients, which stay
    return engine, packed, batch, peak_of(engine, batch, plan) + states_to_come(packed)


def fit(small, more, said):
    engine, packed, batch, least = small
    with counted(engine, batch, least + more) as memory:
        return fit_memory(engine, packed, batch, memory, pack_name="the worst pack", say=said.append)


def test_a_pack_whose_inputs_the_host_cannot_hold_is_refused_before_they_are_sent_there(small, monkeypatch):
    host_has(monkeypatch, limit=10**6)
    found = fit(small, 10_000, []).plan
    assert Recompute.offload in found.vision
    host_has(monkeypatch, limit=1000)
    said = []
    with pytest.raises(
        RunError, match=r"the worst pack needs the inputs .* the host\. These need .*max_tokens"
    ):
        fit(small, 10_000, said)
    assert not any("offload" in line for line in said)


def test_what_a_dry_run_took_of_the_host_is_not_asked_for_again(small, monkeypatch):
    engine, packed, batch, _ = small
    with counted(engine, batch, 10**11) as memory:
        fitting = Fitting(engine, packed, batch, memory, "the worst pack", lambda _: None)
        size, widths = fitting.size, fitting.row_bytes
        inputs = size.patches * sum(widths.vision) + size.tokens * sum(widths.language)
        host_has(monkeypatch, limit=inputs)
        all_offloaded = fitting._all_at(Recompute.offload)
        assert fitting._dry_run(all_offloaded) is not None
        host_has(monkeypatch, limit=0)  # torch keeps what it page-locked
        assert fitting._dry_run(all_offloaded) is not None
        assert fitting._dry_run(all_offloaded._replace(vision=(Recompute.layer,) * 4)) is not None


def test_a_pack_that_exceeds_the_limit_with_all_inputs_on_the_host_is_refused_too(small):
    """The device still holds it, but not beside the states that the first step makes."""
    said = []
    with pytest.raises(RunError, match=r"the worst pack does not fit, .* GiB were in use at the peak"):
        fit(small, -1000, said)
    assert any("offload" in line for line in said)
    assert "does not fit" not in said[-1]
