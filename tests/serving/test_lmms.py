"""lmms-eval runs a task over the server: for real, where VL3TRAIN_LMMS_EVAL names the Python of its environment.

python -m venv lmms && lmms/bin/pip install lmms-eval==0.7.3 'filelock<4'
    lmms/bin/pip install --no-deps -e .
VL3TRAIN_LMMS_EVAL=lmms/bin/python python -m pytest tests/serving/test_lmms.py
"""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.serving.conftest import as_data_url, ask, said, served

TASK = """
task: vl3train_tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/docs.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function tiny.visual
doc_to_text: !function tiny.text
doc_to_target: answer
doc_to_messages: !function tiny.messages
generation_kwargs: {{max_new_tokens: 12, temperature: 0, do_sample: false, until: ["never there"]}}
process_results: !function tiny.results
metric_list:
  - {{metric: exact, aggregation: mean, higher_is_better: true}}
"""
CODE = """
from PIL import Image


def visual(doc):
    return [Image.open(doc["path"])] if doc["kind"] == "image" else [doc["path"]]


def text(doc, kwargs=None):
    return doc["question"]


def messages(doc, kwargs=None):
    medium = {"type": doc["kind"], "url": visual(doc)[0]}
    return [{"role": "user", "content": [medium, {"type": "text", "text": text(doc)}]}]


def results(doc, found):
    return {"exact": float(found[0] == doc["answer"])}
"""


@pytest.mark.skipif("VL3TRAIN_LMMS_EVAL" not in os.environ, reason="VL3TRAIN_LMMS_EVAL names no Python")
def test_a_task_gets_the_answers_of_the_server(served_asker, media, tmp_path):
    with served({"small": served_asker}, media_root=media) as address:
        docs = []
        for kind, name, question in (
            ("image", "a.jpg", "How many?"),
            ("image", "b.png", "How many?"),
            ("video", "long.mp4", "What happens?"),
        ):
            body = said(question, (kind, as_data_url(media / name)), max_tokens=12)
            answer = ask(address, body)[1]["choices"][0]["message"]["content"]
            docs.append({"kind": kind, "path": str(media / name), "question": question, "answer": answer})
        (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        (tmp_path / "tiny.yaml").write_text(TASK.format(folder=tmp_path))
        (tmp_path / "tiny.py").write_text(CODE)
        words = ["--model", "vl3train", "--model_args", f"base_url=http://{address}/v1,media_root={media}"]
        words += ["--tasks", "vl3train_tiny", "--include_path", str(tmp_path), "--batch_size", "1"]
        done = subprocess.run(
            [
                os.environ["VL3TRAIN_LMMS_EVAL"],
                "-m",
                "lmms_eval",
                *words,
                "--output_path",
                str(tmp_path / "out"),
            ],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
            capture_output=True,
            text=True,
            timeout=500,
        )
        files = list((tmp_path / "out").rglob("*results.json"))
        assert len(files) == 1, (
            f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )  # it returns 0 after errors, too
        row = json.loads(files[0].read_text())["results"]["vl3train_tiny"]
        assert row["exact,none"] == 1.0, done.stdout
