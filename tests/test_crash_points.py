"""A life of 20 tasks, ended anywhere and gone on with, says in the end what the one says that nothing happened to.

A sample of what `make crash` tries at every point. tests/crash holds the parts, docs/crashes.md says what they show.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import pytest
from crash import plans
from crash.killing import End, Jury, Trial, Verdict
from crash.power import Cut

MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def jury(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jury]:
    folder = tmp_path_factory.mktemp("crash")
    in_memory = MEMORY / f"{os.getpid()}-{folder.name}" if MEMORY.is_dir() else folder
    with Jury(in_memory, 1) as judges:
        yield judges


def verdicts(jury: Jury, trials: Sequence[Trial | Cut]) -> list[Verdict]:
    """Of trials in which nothing went wrong."""
    judged = list(jury.judge(trials))
    assert [(trial, verdict.wrong) for trial, verdict in judged if verdict.wrong] == []
    return [verdict for _, verdict in judged]


def test_everything_a_life_does_to_the_outside_is_a_point(jury: Jury) -> None:
    assert jury.points > 2000
    met = {"statement", "read", "write", "sync", "truncate", "open", "delete", "send", "answer", "piece"}
    assert met | {"tool", "reset", "step", "snapshot"} == set(jury.kinds)


def test_killed_at_any_point_it_goes_on(jury: Jury) -> None:
    every = jury.points // 8
    found = verdicts(jury, plans.kills(jury.points, every, first=Random(1).randint(1, every)))
    assert {verdict.ended[0] for verdict in found} == {"killed"}


def test_killed_while_a_thread_commits_it_goes_on(jury: Jury) -> None:
    assert verdicts(jury, plans.kills_of_threads(jury.points, 2, Random(2)))


def test_killed_again_while_it_resumes_it_goes_on(jury: Jury) -> None:
    found = verdicts(jury, plans.kills_again(jury.points, 3, Random(3)))
    assert all(verdict.ended.count("killed") >= 2 for verdict in found)


def test_where_a_statement_fails_it_stops_with_a_typed_error_and_goes_on_later(jury: Jury) -> None:
    found = verdicts(jury, plans.statements_fail(jury.points, jury.points // 4, first=700))
    assert "full" in {verdict.ended[0] for verdict in found}


def test_where_a_write_or_a_sync_fails_it_stops_with_a_typed_error_and_goes_on_later(jury: Jury) -> None:
    found = verdicts(jury, plans.writes_fail(jury.kinds, jury.kinds["write"] // 4, first=200))
    assert "full" in {verdict.ended[0] for verdict in found}


def test_a_file_that_may_not_grow_stops_it_and_it_goes_on_later(jury: Jury) -> None:
    found = verdicts(jury, [Trial((End(longest=size),)) for size in (20_000, 210_000)])
    assert [verdict.ended[0] for verdict in found] == ["full", "full"]


def test_a_full_file_system_stops_it_and_it_goes_on_when_there_is_space(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(small)], capture_output=True)
    if made.returncode:
        pytest.skip("may not mount a small file system here")
    try:
        with Jury(small / "jury", 1) as jury:
            found = verdicts(jury, [Trial((End(space=left),)) for left in (8_192, 200_000)])
        assert [verdict.ended[0] for verdict in found] == ["full"] * 2
    finally:
        subprocess.run(["umount", str(small)], check=True)
