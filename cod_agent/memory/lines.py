"""JSON Lines, written whole or not at all: an object a line, in ASCII.

Every other character is escaped, as JSON allows: what others wrote commands no terminal, and a line is a line to every reader.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from cod_agent.errors import StoreFull, UsageError
from cod_agent.memory import places
from cod_agent.memory.backup import part_of, publish
from cod_agent.memory.readonly import connect

_SQLITE = b"SQLite format 3\0"


def write(objects: Iterable[dict[str, Any]], out: TextIO) -> int:
    """Write objects to an open file; how many they were.

    Raises:
        OSError: it takes no more.
        ValueError: something is no JSON, as NaN is none.
    """
    count = 0
    for one in objects:
        out.write(json.dumps(one, allow_nan=False) + "\n")
        count += 1
    out.flush()
    return count


def save(objects: Iterable[dict[str, Any]], to: str | Path, db: str | Path) -> int:
    """Write objects to a file that gets its name when it is whole, in place of one that is there; how many they were.

    Args:
        db: the run database they come from: it stays, and who may read it may read the file.

    Raises:
        UsageError: that is a database, or no file; or there is no `db`.
        StoreFull: it cannot be written.
    """
    goal = Path(to)
    try:
        goal = goal.resolve()
        _check(goal, Path(db))
        part = part_of(goal)
        try:
            with part.open("w", encoding="ascii", newline="\n") as out:
                count = write(objects, out)
            publish(part, goal, Path(db).stat().st_mode & 0o777)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise StoreFull(f"{to} cannot be written ({error}): choose another place, or make room there") from error
    return count


def _check(goal: Path, db: Path) -> None:
    connect(db).close()  # it is there: else a folder would be made for nothing
    if places.is_part(goal, db):
        raise UsageError(f"{goal} is the database itself, or a part of it: name another file")
    if not goal.exists():
        return
    if not goal.is_file():
        raise UsageError(f"{goal} is no file: name one, or write to standard output")
    with goal.open("rb") as there:
        if there.read(len(_SQLITE)) == _SQLITE:
            raise UsageError(f"{goal} is a database, which would be lost: name another file")
