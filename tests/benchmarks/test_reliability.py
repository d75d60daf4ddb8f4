"""The kills of benchmarks/reliability.py: how many, at places that exist, and who is killed."""

from __future__ import annotations

import json
from collections import Counter
from importlib import import_module

from benchmarks import reliability
from benchmarks.kills.kills import chains
from tests.engine.ends import ENDS, LOADED, MORE_ENDS, RESUMED
from tests.engine.planted import PLACES, WHATS

ELSEWHERE = {"worker", "collate", "decode", "decode_server", "gather_evaluation", "half_deleted"}


def test_there_are_sixty_kills_of_every_kind_of_process_the_same_for_a_seed():
    kills = [kill for chain in chains(0) for kill in chain]
    assert len(kills) >= 60
    victims = Counter(kill.victim for kill in kills)
    assert min(victims.values()) >= 4
    assert victims.keys() == {"rank", "all", "launcher", "worker", "decode_process", "decode_server"}
    assert chains(0) == chains(0) != chains(1)


def test_twenty_exceptions_on_both_ranks():
    assert len(ENDS) + len(RESUMED) >= 20, "in the suite"
    assert Counter(rank for _, rank, _ in ENDS).keys() == {0, 1}


def test_all_places_exist():
    for module, names, _ in PLACES.values():
        owner = import_module(f"vl3train.{module}")
        for name in names.split("."):
            owner = getattr(owner, name)
    planted = [kill.place for chain in chains(0) for kill in chain if kill.place]
    wheres = {
        where
        for what, where in (one.split("@") for one, _, _ in (*ENDS, *MORE_ENDS, *RESUMED, LOADED))
        if what in WHATS
    }
    assert wheres | set(planted) <= PLACES.keys() | ELSEWHERE


def test_the_figures_count_what_came_out_well(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(reliability, "RESULTS", tmp_path)
    monkeypatch.setattr(reliability, "commit", lambda: "abc")
    lines = [
        {"kill": "rank 0", "tried": True, "problem": None},
        {"kill": "all", "tried": True, "problem": "no"},
    ]
    assert reliability.report({"kills": lines}) == 1
    kept = [json.loads(line) for line in (tmp_path / "reliability.jsonl").read_text().splitlines()]
    assert {line["figure"]: line["value"] for line in kept} == {"kills_tried": 2, "kills_survived": 1}
    assert {"unit", "better", "machine", "versions", "command", "commit", "date"} <= kept[0].keys()
    assert "all: no" in capsys.readouterr().out


def test_after_its_time_nothing_begins_and_what_was_done_counts(tmp_path):
    line = {"kill": "all", "tried": True, "problem": None}

    def done(*, time_is_up):
        return reliability.once(tmp_path, "kills", 0, lambda _: [line], time_is_up=time_is_up)

    assert done(time_is_up=True) == []
    assert done(time_is_up=False) == [line]
    assert done(time_is_up=True) == [line]
