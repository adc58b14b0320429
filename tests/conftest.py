"""What holds for every test."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cod_agent import Memory

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # Started in the background of a shell: commands that the tests stop by SIGINT would inherit that nobody listens to it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests and the processes they start run side by side: threads that wait for one another's cores take several times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MINUTES = ("test_in_process", "test_verl")
"""Files of whole trainings, the longest ones."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files begin, then those with slow tests: side by side, no core waits for a long one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.stem not in MINUTES, item.path not in slow))


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    """A run database of the test's own."""
    opened = Memory.open(tmp_path / "runs.db", durable=False)
    yield opened
    opened.close()
