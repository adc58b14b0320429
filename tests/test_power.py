"""A power cut takes nothing a commit acknowledged. How a cut is played back, and how faithful that is: docs/crashes.md."""

from __future__ import annotations

import os
from collections.abc import Iterator
from random import Random

import pytest
from crash import plans
from crash.disk import Op
from crash.killing import Jury
from crash.power import SECTOR, cut
from test_crash_points import MEMORY, verdicts


@pytest.fixture(scope="module")
def jury(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jury]:
    folder = tmp_path_factory.mktemp("power")
    with Jury(MEMORY / f"{os.getpid()}-{folder.name}" if MEMORY.is_dir() else folder, 1) as judges:
        yield judges


def operations(jury: Jury) -> int:
    return sum(jury.kinds[kind] for kind in ("open", "write", "sync", "truncate", "delete"))


def test_a_power_cut_takes_nothing_that_was_acknowledged(jury: Jury) -> None:
    found = verdicts(jury, plans.cuts(operations(jury), 20, Random(1)))
    assert sum(len(verdict.ended) == 2 for verdict in found) == 4, "some went on to the end"


def test_without_syncs_it_takes_some_and_leaves_a_sound_file(jury: Jury) -> None:
    """durable=False; and that the test above could fail."""
    found = verdicts(jury, plans.cuts(operations(jury), 12, Random(2), durable=False))
    assert sum(verdict.lost > 0 for verdict in found) > 3


# ---- how a cut is played back ----

A = [Op("open", "a"), Op("write", "a", 0, b"x" * 2 * SECTOR)]


def contents(ops: list[Op]) -> set[bytes | None]:
    return {cut(ops, len(ops), Random(seed)).files.get("a") for seed in range(60)}


def test_what_was_synced_with_its_directory_is_there() -> None:
    assert contents([*A, Op("sync", "a", 1)]) == {b"x" * 2 * SECTOR}


def test_a_file_whose_directory_was_not_synced_may_be_gone() -> None:
    assert contents([*A, Op("sync", "a")]) == {b"x" * 2 * SECTOR, None}


def test_each_sector_that_was_not_synced_may_be_missing() -> None:
    zeros, there = b"\0" * SECTOR, b"x" * SECTOR
    assert contents([*A[:1], Op("sync", "a", 1), A[1]]) == {b"", there, zeros + there, there + there}


def test_a_truncation_and_a_deletion_that_were_not_synced_may_not_have_been() -> None:
    safe = [*A, Op("sync", "a", 1)]
    assert contents([*safe, Op("truncate", "a", 3)]) == {b"xxx", b"x" * 2 * SECTOR}
    assert contents([*safe, Op("delete", "a")]) == {None, b"x" * 2 * SECTOR}
    assert contents([*safe, Op("delete", "a", 1)]) == {None}
