"""What happens, while it happens: a line each in loop.jsonl, and for a person a live view (terminal) or plain lines."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cod_agent.cli.output import EVERY, console
from cod_agent.errors import StoreFull

if TYPE_CHECKING:
    from rich.console import RenderableType

EVENTS = "loop.jsonl"


class View:
    """Tells one sitting of a loop.

    Args:
        out: the loop's folder.
        total: rounds there will be.
    """

    def __init__(self, out: Path, total: int) -> None:
        self._file, self._total = out / EVENTS, total
        self._round, self._stage, self._note = 0, "", ""
        self._done = self._of = 0
        self._began = self._said = time.monotonic()
        self._serves, self._since = "", time.time()
        self._curve: RenderableType = ""
        self._live: Any = None

    def __enter__(self) -> View:
        if self._file.is_file() and (said := self._file.read_bytes()) and not said.endswith(b"\n"):
            self._append("")  # a kill tore the last line; the next begins on one of its own
        if sys.stderr.isatty():
            from rich.live import Live

            self._live = Live(
                get_renderable=self._shown, console=console(err=True), refresh_per_second=4, transient=True
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def event(self, name: str, told: str, /, **fields: Any) -> None:
        """Something happened.

        Args:
            name: one of those in docs/loop.md.
            told: the same for a person.
            fields: plain JSON that belongs to it.

        Raises:
            StoreFull: the disk is full.
        """
        at = {"round": self._round, "stage": self._stage} if self._round else {}
        line = json.dumps({"time": round(time.time(), 3), "event": name, **at, **fields, "told": told})
        self._append(line)
        if self._live is not None:
            self._live.console.print(told, markup=False)
        else:
            typer.echo(told, err=True)

    def _append(self, line: str) -> None:
        try:
            with self._file.open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            raise StoreFull(
                f"cannot write {self._file}: {error.strerror}; make room, then the same command goes on"
            ) from error

    def stage(self, number: int, stage: str) -> None:
        """A stage begins."""
        self._round, self._stage, self._note, self._done, self._of = number, stage, "", 0, 0
        self._began = self._said = time.monotonic()

    def progress(self, done: int, of: int, note: str = "") -> None:
        """How far the stage is."""
        self._done, self._of, self._note = done, of, note
        if self._live is None and time.monotonic() - self._said >= EVERY:
            self._said = time.monotonic()
            typer.echo(self._heading(), err=True)

    def serves(self, weights: str, since: float) -> None:
        """What agents get answers of, and since when (seconds since 1970)."""
        self._serves, self._since = weights, since

    def curve(self, table: RenderableType) -> None:
        """What rounds have brought so far."""
        self._curve = table

    def _heading(self) -> str:
        if not self._round:
            return "starting"
        counted = f" {self._done} of {self._of}" if self._of else ""
        seconds = time.monotonic() - self._began
        return f"round {self._round} of {self._total}, {self._stage}{counted}, {seconds:.0f} s {self._note}".rstrip()

    def _shown(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        since = time.strftime("%H:%M:%S", time.localtime(self._since))
        serves = f"serves {self._serves} since {since}" if self._serves else "serves nothing yet"
        bar = Table.grid()
        bar.add_row(ProgressBar(total=self._of or 1, completed=self._done, width=48))
        return Group(Text(self._heading(), style="bold"), bar, Text(serves), self._curve)
