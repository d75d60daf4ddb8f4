"""W&B's key is found where W&B finds it, and a netrc file that cannot be read is a problem, not a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.test_rules import keys, only_problem
from vl3train.config.checks.tracking import wandb_key_is_set, wandb_mode
from vl3train.config.choices import WandbMode

TRACKED = ("stage=1", "tracking=wandb")
ONLINE = (*TRACKED, "tracking.mode=online")


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)


def test_online_needs_a_key(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    assert keys(*TRACKED) == []
    assert keys(*ONLINE) == ["tracking.mode"]
    (workplace / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert keys(*ONLINE) == []
    (workplace / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert keys(*ONLINE) == []


def test_auto_is_online_where_a_key_is(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    assert wandb_mode(WandbMode.auto) == "offline"
    file = workplace / "netrc"
    file.write_text("machine elsewhere.example login user password x\n")
    monkeypatch.setenv("NETRC", str(file))
    assert not wandb_key_is_set()
    file.write_text("machine api.wandb.ai login user password x\n")
    assert wandb_mode(WandbMode.auto) == "online"
    assert wandb_mode(WandbMode.offline) == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example:8080/path")
    assert not wandb_key_is_set(), "the key is for another server"
    monkeypatch.delenv("WANDB_BASE_URL")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode(WandbMode.auto) == "offline"
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", str(workplace / "absent"))
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_mode(WandbMode.auto) == "online"


@pytest.mark.parametrize("content", [b"machine api.wandb.ai login user S3CRET\n", b"\xff\xfe\x00"])
def test_a_netrc_file_that_cannot_be_read_is_a_problem(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
):
    file = workplace / "netrc"
    file.write_bytes(content)
    monkeypatch.setenv("NETRC", str(file))
    for mode in ("online", "auto"):
        text = only_problem(*TRACKED, f"tracking.mode={mode}")
        assert text.startswith(
            f"tracking.mode={mode}: W&B's key is looked for in {file}, which cannot be read: "
        )
        assert "S3CRET" not in text, "what netrc did not expect may be the key"
        assert text.endswith("; repair the file, set WANDB_API_KEY, or use tracking.mode=offline")
    assert keys(*TRACKED, "tracking.mode=offline") == []
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert keys(*TRACKED) == [], "no key is looked for"
