"""Each promise of docs/security.md names the test that holds it; and no code appears that could break the first."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "security.md"
FILES = sorted(path for folder in ("vl3train", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")

MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "code",
    "pty",
    "runpy",
}
CALLS = {
    "eval": "runs a text",
    "exec": "runs a text",
    "compile": "makes code of a text",
    "__import__": "runs a file",
    "os.system": "is a shell",
    "os.popen": "is a shell",
    "subprocess.getoutput": "is a shell",
    "subprocess.getstatusoutput": "is a shell",
    "tempfile.mktemp": "is a name that another may take first",
    "yaml.load": "builds what its loader allows",
    "yaml.unsafe_load": "builds Python objects",
    "yaml.full_load": "builds Python objects",
    "shutil.unpack_archive": "unpacks names as they are",
    "torch.hub.load": "runs a repository's code",
    "torch.package.PackageImporter": "runs a package's code",
    "torch.jit.load": "runs a file's code",
    "torch.export.load": "unpickles",
    "hydra.utils.instantiate": "calls what a config names",
    "instantiate": "calls what a config names",
    "load_dataset": "may run a data set's script",
    "import_module": "runs a file",
    "importlib.import_module": "runs a file",
    "os.chmod": "changes who may read or write",
    "os.umask": "changes who may read or write",
}
UNPICKLES = {
    "recv",
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "scatter_object_list",
    "read_pickle",
}
"""Methods of pipes between processes, of collectives, and of pandas."""
UNPACKS = {"extract", "extractall"}
ALLOWED = {
    (
        "vl3train/model/weights/headers/pickled.py",
        "pickle",
    ): "an unpickler that knows the calls of tensors only",
    ("vl3train/engine/checkpoints/load.py", "pickle"): "the name of an error",
    ("vl3train/config/input/words.py", "yaml.load"): "_Words is a SafeLoader",
    ("vl3train/cli/main.py", "import_module"): "the module of a command, out of a table",
    ("vl3train/contracts/imports/lean.py", "importlib.import_module"): "a module of torch's compiler",
    ("vl3train/model/attention/backends.py", "importlib.import_module"): "a library, out of a table",
    ("vl3train/model/kernels/check.py", "importlib.import_module"): "a module of ours",
    (
        "vl3train/data/render/decode_server.py",
        "recv",
    ): "from the process that started it, over a private socket",
    ("vl3train/engine/ranks.py", "all_gather_object"): "between the ranks of one job",
    ("vl3train/engine/held_out/losses.py", "all_gather_object"): "between the ranks of one job",
    ("benchmarks/gpu/process.py", "recv"): "from a process that the benchmark started",
}


def findings(text: str) -> Iterator[tuple[int, str, str]]:
    """Line, name and reason of whatever could run code of a file, a shell, or unpack a name as it is."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
            )
            for name in names:
                if name.partition(".")[0] in MODULES:
                    yield node.lineno, name.partition(".")[0], "reads objects that may run code"
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {one.arg: ast.unparse(one.value) for one in node.keywords}
            if name in CALLS:
                yield node.lineno, name, CALLS[name]
            if name.rpartition(".")[2] in UNPICKLES and "." in name:
                yield node.lineno, name.rpartition(".")[2], "unpickles"
            if name.rpartition(".")[2] in UNPACKS and "." in name:
                yield node.lineno, name.rpartition(".")[2], "unpacks names as they are"
            if name == "torch.load" and options.get("weights_only") != "True":
                yield node.lineno, name, "needs weights_only=True"
            if name in ("np.load", "numpy.load") and options.get("allow_pickle") != "False":
                yield node.lineno, name, "needs allow_pickle=False"
            if options.get("trust_remote_code", "False") != "False":
                yield node.lineno, name, "trusts remote code"
            if re.fullmatch(r"Auto\w+\.from_pretrained", name) and "trust_remote_code" not in options:
                yield node.lineno, name, "asks the terminal without trust_remote_code=False"
            if options.get("shell", "False") != "False":
                yield node.lineno, name, "is a shell"


def in_tree() -> list[tuple[str, int, str, str]]:
    return [
        (file.relative_to(ROOT).as_posix(), *found)
        for file in FILES
        for found in findings(file.read_text(encoding="utf-8"))
    ]


def test_nothing_unpickles_runs_code_of_a_file_or_opens_a_shell():
    """A new place goes into ALLOWED with its reason, or is written another way."""
    found = in_tree()
    assert [one for one in found if (one[0], one[2]) not in ALLOWED] == []
    assert set(ALLOWED) <= {(file, name) for file, _, name, _ in found}, "of something that is gone"


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "import torch; torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=flag)",
        "np.load(f)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f, yaml.Loader)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "eval(text)",
        "AutoModel.from_pretrained(folder)",
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
        "load_dataset(name)",
        "pipe.recv()",
        "dist.broadcast_object_list(things)",
        "tarfile.open(f).extractall(folder)",
    ],
)
def test_each_of_them_would_be_found(line):
    assert list(findings(line))


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(f, weights_only=True)",
        "np.load(f, allow_pickle=False)",
        "yaml.safe_load(f)",
        "subprocess.run([a, b])",
        "AutoModel.from_pretrained(folder, trust_remote_code=False)",
        "model.eval()",
    ],
)
def test_and_its_right_form_is_none(line):
    assert not list(findings(line))


def promises() -> list[str]:
    text = PAGE.read_text(encoding="utf-8").partition("## Promised")[2].partition("## Not promised")[0]
    return [line for line in re.split(r"^- ", text, flags=re.MULTILINE)[1:]]


def test_every_promise_names_tests_that_exist():
    assert len(promises()) >= 15
    for promise in promises():
        named = TEST.findall(promise)
        assert named, f"no test is named: {promise}"
        for file, name in named:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            there = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert name in there, f"{file} has no {name}: {promise}"
