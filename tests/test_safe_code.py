"""Nothing here runs what it reads: no pickle, no eval, no code of a checkpoint's. The linter knows most (pyproject.toml), this the rest."""

from __future__ import annotations

import ast
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from cod_agent.errors import UsageError
from cod_agent.models.gguf import read_metadata, read_tensors
from cod_agent.policies import folder_of

ROOT = Path(__file__).parent.parent
PACKAGES = ("cod_agent", "cod_train", "experiments", "examples", "benchmarks")
PICKLES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
TELLING = """
import pickle
from joblib import load
import torch, numpy, transformers
torch.load("x")
torch.load("x", weights_only=False)
numpy.load("x", allow_pickle=True)
transformers.AutoModel.from_pretrained("x", trust_remote_code=True)
getattr(transformers, "AutoModel").from_pretrained("x", use_safetensors=False)
"""


def unsafe(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of what reads more than data."""
    for node in ast.walk(tree):
        names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            if name.partition(".")[0] in PICKLES:
                yield node.lineno, f"imports {name}"
        if not isinstance(node, ast.Call):
            continue
        said = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        called = ast.unparse(node.func)
        if called == "torch.load" and said.get("weights_only") is not True:
            yield node.lineno, "torch.load without weights_only=True"
        for word, value in (("allow_pickle", True), ("trust_remote_code", True), ("use_safetensors", False)):
            if said.get(word) is value:
                yield node.lineno, f"{called}({word}={value})"


def test_the_code_reads_data_and_nothing_that_runs() -> None:
    found = []
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    for path in files:
        found += [f"{path.relative_to(ROOT)}:{line}: {what}" for line, what in unsafe(ast.parse(path.read_text()))]
    assert len(files) > 200 and found == []


def test_what_is_looked_for_would_be_found() -> None:
    assert [line for line, _ in unsafe(ast.parse(TELLING))] == [2, 3, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    "line",
    [
        "eval(input())",
        "exec(input())",
        "import pickle; pickle.loads(b'')",
        "import yaml; yaml.load(input(), Loader=yaml.Loader)",
        "import subprocess; subprocess.run(input(), shell=True)",
        "import os; os.system(input())",
        "import tempfile; tempfile.mktemp()",
        "import requests; requests.get('https://x', verify=False)",
        "import tarfile; tarfile.open('x').extractall('y')",
    ],
)
def test_the_linter_stops(line: str) -> None:
    pytest.importorskip("ruff")
    checked = subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--config",
            ROOT / "pyproject.toml",
            "--stdin-filename=cod_agent/x.py",
            "-",
        ],
        input=f"{line}\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert checked.returncode == 1 and "S" in checked.stdout and "[S" not in line, checked.stdout
    assert any(f"S{number}" in checked.stdout for number in range(100, 710)), checked.stdout


def test_a_checkpoint_of_pickles_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    from cod_train.checkpoint_files import check_servable

    folder = Path(shutil.copytree(folder_of("embedded-base"), tmp_path / "model"))
    check_servable(folder, None)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match="safetensors"):
        check_servable(folder, None)


def _gguf() -> Path:
    return next(folder_of("embedded-base").glob("*.gguf"))


def test_a_damaged_model_file_is_an_error_that_says_so(tmp_path: Path) -> None:
    raw, dice, path = _gguf().read_bytes(), Random(1), tmp_path / "model.gguf"
    head, refused = 4096, 0
    for _ in range(300):
        damaged = bytearray(raw)
        for _ in range(dice.randint(1, 8)):
            damaged[dice.randrange(head)] = dice.randrange(256)
        path.write_bytes(damaged[: dice.choice([len(raw), dice.randrange(head)])])
        try:
            read_metadata(path)
            read_tensors(path)
        except UsageError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("count", [2**62, 2**32, 2**31 - 1])
def test_a_model_file_that_promises_terabytes_takes_none(tmp_path: Path, count: int) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, count, count) + struct.pack("<Q", count))
    with pytest.raises(UsageError, match="damaged or cut off"):
        read_metadata(path)


def test_weights_whose_head_lies_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    from cod_train.checkpoint_files import check_servable

    folder = Path(shutil.copytree(folder_of("embedded-base"), tmp_path / "model"))
    raw = (folder / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    head = json.loads(raw[8 : 8 + size])
    for damaged in (
        struct.pack("<Q", 2**62) + raw[8:],
        raw[: len(raw) // 2],
        struct.pack("<Q", size) + b"[" * size + raw[8 + size :],
        b"",
    ):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(UsageError):
            check_servable(folder, None)
    assert "lm_head.weight" in head or len(head) > 5
