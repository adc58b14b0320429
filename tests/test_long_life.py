"""Two hundred tasks in one run cost what the first ones cost: by counts, which do not depend on the machine. The whole length and the
times are in benchmarks/long_life.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from long_life import LIVES, afterwards, live, scans

TASKS, EVERY = 200, 50


@pytest.mark.parametrize("kind", LIVES)
def test_a_task_costs_the_same_however_many_lie_behind_it(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "life.db"
    _, second, third, last = live(path, kind, TASKS, EVERY, durable=False)
    assert last["steps"] < 1.02 * second["steps"], (
        "a question reads what lies behind: see `scans`, and tests of its plan"
    )
    assert last["bytes"] < 1.15 * second["bytes"]
    assert last["context"] <= max(second["context"], 2000)
    assert last["wal_mb"] < 6, "the write-ahead log is emptied into the file"
    assert last["rss_mb"] - third["rss_mb"] < 2
    assert set(afterwards(path, kind, TASKS)) >= {"context_log", "verify"}


@pytest.mark.parametrize("kind", LIVES)
def test_no_statement_of_a_life_reads_a_whole_table(kind: str, tmp_path: Path) -> None:
    assert scans(tmp_path / "life.db", kind, 3) == []
