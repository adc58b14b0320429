"""Which trials there are: every point, or a sample of them."""

from __future__ import annotations

from collections import Counter
from random import Random

from crash.killing import End, Trial
from crash.power import Cut

FOREVER = 10**9


def kills(points: int, every: int = 1, first: int = 1) -> list[Trial]:
    """Killed once, at every n-th point."""
    return [Trial((End(dies=at),)) for at in range(first, points + 1, every)]


def kills_of_threads(points: int, many: int, dice: Random) -> list[Trial]:
    """Killed once, while a worker thread commits."""
    return [Trial((End(dies=dice.randint(1, points)),), threads=True) for _ in range(many)]


def kills_again(points: int, many: int, dice: Random) -> list[Trial]:
    """Killed, and killed while resuming: soon after it began, or anywhere in what is left; every third trial a third time."""
    found = []
    for number in range(many):
        first = dice.randint(1, points)
        later = [dice.randint(1, 400 if number % 2 else max(400, points - first)) for _ in range(1 + (number % 3 == 0))]
        found.append(Trial((End(dies=first), *(End(dies=at) for at in later))))
    return found


def statements_fail(points: int, every: int, first: int = 1) -> list[Trial]:
    """A statement fails, alone or with all that follow; by turns on a full disk and with I/O errors."""
    return [
        Trial((End(statements=(at, FOREVER if number % 4 < 2 else at + 1), full=number % 2 == 0),))
        for number, at in enumerate(range(first, points + 1, every))
    ]


def writes_fail(kinds: Counter[str], every: int, first: int = 1) -> list[Trial]:
    """The same one floor below: what SQLite writes and syncs."""
    several = kinds["write"] + kinds["sync"] + kinds["truncate"]
    return [
        Trial((End(writes=(at, FOREVER if number % 4 < 2 else at + 1), full=number % 2 == 0),))
        for number, at in enumerate(range(first, several + 1, every))
    ]


def cuts(operations: int, many: int, dice: Random, *, durable: bool = True) -> list[Cut]:
    """The power is cut: every fourth time while the file is being made, and every fifth time the life goes on afterwards."""
    return [
        Cut(dice.randint(0, 160 if number % 4 == 0 else operations), number, durable, resumed=number % 5 == 0)
        for number in range(many)
    ]
