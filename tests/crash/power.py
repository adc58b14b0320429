"""What a disk may hold after its power was cut: everything that was synced, and any part of what was not.

`recorded` lives a life and keeps what SQLite did to its files. `cut` plays that back up to a moment and gives the files as the next
boot may find them. Between two syncs a disk may do things in any order, and half: of what was written and not synced, each sector
of 512 bytes is there or is not, each by itself; a size that was not synced is the old or the new one; a file that was made or
deleted is there or not until its directory was synced. What SQLite itself takes for granted is taken for granted here: that
a sync is one, and that writing a sector leaves its neighbours alone (https://www.sqlite.org/atomiccommit.html, section 2).
"""

from __future__ import annotations

import json
import os
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from crash.disk import Op

SECTOR = 512
TABLES = ("commits", "calls", "effects", "attempts")


@dataclass(frozen=True)
class Cut:
    """The power is cut."""

    at: int
    """After so many operations."""
    seed: int
    durable: bool = True
    resumed: bool = True
    """Whether the life is lived to its end afterwards."""


@dataclass
class _File:
    """A file on a disk: what is safe, and what is not yet."""

    safe: bytearray = field(default_factory=bytearray)
    waiting: list[Op] = field(default_factory=list)
    named: bool = False
    """Whether its name is safe."""
    deleted: bool = False
    """It is no longer there, but that is not safe."""


@dataclass(frozen=True)
class Found:
    """What the next boot finds."""

    files: dict[str, bytes]
    acknowledged: tuple[int, ...]
    """Rows of each of `TABLES` that were committed, as the program was told before the cut."""
    lines: int
    """Lines of the log of what was really done."""


def cut(ops: Sequence[Op], at: int, dice: Random) -> Found:
    """The files after a cut at that moment. What was not synced survives not at all, in part or as a whole, as the dice say."""
    files: dict[str, _File] = {}
    acknowledged, lines = (0,) * len(TABLES), 0
    for op in ops[:at]:
        if op.what == "said":
            if op.path == "log":
                lines += 1
            else:
                acknowledged = tuple(json.loads(op.path))
            continue
        file = files.setdefault(op.path, _File())
        if op.what == "open":
            files[op.path] = _File()
        elif op.what == "delete":
            file.deleted = True
        elif op.what == "sync":
            for waiting in file.waiting:
                _apply(file.safe, waiting)
            file.waiting = []
        else:
            file.waiting.append(op)
        if op.what in ("sync", "delete") and op.at:  # the directory too
            files = {path: file for path, file in files.items() if not file.deleted}
            for file in files.values():
                file.named = True
    chance = dice.choice((0.0, 0.5, 0.9, 1.0))
    there = {path: file for path, file in files.items() if _survives(file, dice)}
    return Found({path: _after(file, chance, dice) for path, file in there.items()}, acknowledged, lines)


def _survives(file: _File, dice: Random) -> bool:
    return (file.named or dice.random() < 0.5) and not (file.deleted and dice.random() < 0.5)


def _after(file: _File, chance: float, dice: Random) -> bytes:
    kept = bytearray(file.safe)
    for op in file.waiting:
        if op.what == "truncate":
            if dice.random() < chance:
                _apply(kept, op)
            continue
        for start in range(0, len(op.data), SECTOR):
            if dice.random() < chance:
                _apply(kept, op._replace(at=op.at + start, data=op.data[start : start + SECTOR]))
    return bytes(kept)


def _apply(content: bytearray, op: Op) -> None:
    if op.what == "truncate":
        del content[op.at :]
        content.extend(bytes(op.at - len(content)))
        return
    content.extend(bytes(max(0, op.at - len(content))))
    content[op.at : op.at + len(op.data)] = op.data


def recorded(folder: Path, live: Callable[[], object]) -> list[Op]:
    """The operations of a life, which is lived in a fork."""
    kept = folder / "operations"
    pid = os.fork()
    if pid == 0:
        try:
            _record(live, kept)
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("the life that is to be played back failed")
    return [Op(what, path, at, b64decode(data)) for what, path, at, data in map(json.loads, kept.open())]


def _record(live: Callable[[], object], kept: Path) -> None:
    from crash import life, points
    from crash.disk import DISK

    def committed(rows: Sequence[int]) -> None:
        DISK.say(json.dumps(rows))

    def say(log: life.Log, *words: object) -> None:
        really(log, *words)
        DISK.say("log")

    really, life.Log.say = life.Log.say, say  # type: ignore[method-assign]
    points.committed = (committed, TABLES)
    DISK.ops = []
    live()
    with kept.open("w") as out:
        for op in DISK.ops:
            name = op.path if op.what == "said" else Path(op.path).name
            out.write(json.dumps([op.what, name, op.at, b64encode(op.data).decode()]) + "\n")
