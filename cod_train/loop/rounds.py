"""What a round has done, on disk: `round-003/round.json`, written whole at the end of each stage.

A stage that is noted there is done. One that is not is done again from what lies in the folder, and each goes on from
there by itself: agents' runs resume, a training has its checkpoints, an export is renamed when it is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cod_agent.errors import CodError, StoreFull

STAGES = ("record", "train", "export", "gate", "serve")
Noted = dict[str, Any]
"""What a stage notes: plain JSON, with `seconds`."""


class Round:
    """One round of a loop.

    Args:
        out: the loop's folder.
        number: from 1.
    """

    def __init__(self, out: Path, number: int) -> None:
        self.number, self.name = number, f"round-{number:03d}"
        self.folder = out / self.name
        self._file = self.folder / "round.json"
        self.noted: Noted = _read(self._file)

    def database(self, agent: int) -> Path:
        return self.folder / f"agent-{agent}.db"

    @property
    def training(self) -> Path:
        return self.folder / "train"

    @property
    def model(self) -> Path:
        """The candidate, in Hugging Face form."""
        return self.folder / "model"

    @property
    def begun(self) -> bool:
        return bool(self.noted)

    @property
    def ended(self) -> bool:
        return STAGES[-1] in self.noted

    def stage(self, name: str) -> Noted | None:
        """What a stage noted at its end; None: it is still to be done."""
        found: Noted | None = self.noted.get(name)
        return found

    def begin(self, incumbent: str, weights: str) -> None:
        """Note whose weights are deployed; a round that began before keeps to what it began with."""
        if not self.begun:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write({"round": self.number, "incumbent": incumbent, "weights": weights})

    def end(self, stage: str, said: Mapping[str, Any]) -> None:
        """Note that a stage is done."""
        self._write({**self.noted, stage: dict(said)})

    def _write(self, noted: Noted) -> None:
        write_whole(self._file, noted)
        self.noted = noted


def rounds(out: Path) -> list[Round]:
    """Those that have begun, in order."""
    found: list[Round] = []
    while (one := Round(out, len(found) + 1)).begun:
        found.append(one)
    return found


def write_whole(path: Path, value: Any) -> None:
    """Write JSON so that a reader, or a kill, sees the old file or the new one.

    Raises:
        StoreFull: the disk is full, or may not be written; the old file is as it was.
    """
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with beside.open("w") as file:
            file.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise StoreFull(f"cannot write {path}: {error.strerror}; make room, then the same command goes on") from error


def _read(file: Path) -> Noted:
    if not file.is_file():
        return {}
    try:
        found: Noted = json.loads(file.read_text())
    except ValueError as error:
        raise CodError(f"{file} cannot be read ({error}): restore it, or begin again in another --out") from None
    return found
