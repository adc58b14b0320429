"""What every command says in the same way: consoles, progress, the hint how to go on.

Progress is a bar where standard error is a terminal and a plain line now and then where it is not. Results go to
standard output. Nothing is coloured when piped.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cod_agent.errors import CodError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

EVERY = 10.0
"""Seconds between plain lines of progress."""
PIPED_WIDTH = 120


def console(*, err: bool = False) -> Console:
    """Standard output (or error) as a rich console; wide enough when piped."""
    from rich.console import Console

    terminal = (sys.stderr if err else sys.stdout).isatty()
    return Console(stderr=err, width=None if terminal else PIPED_WIDTH, highlight=False, soft_wrap=False)


def print_json(value: Any) -> None:
    """The one JSON object of `--json`."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


class Progress:
    """Counts tasks; `line` puts a line of results on standard output without disturbing the bar."""

    def __init__(self, total: int, what: str) -> None:
        self._total, self._what, self._done, self._note = total, what, 0, ""
        self._started = self._said = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        self._shared = sys.stdout.isatty() and sys.stderr.isatty()

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bars

            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=32),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Bars(*columns, console=console(err=True), transient=True, redirect_stdout=self._shared)
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=self._total, note="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, note: str = "") -> None:
        """One more is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, advance=1, note=note)
        elif time.monotonic() - self._said >= EVERY:
            self._said = time.monotonic()
            seconds = self._said - self._started
            typer.echo(f"{self._what}: {self._done} of {self._total}, {seconds:.0f} s {note}".rstrip(), err=True)

    def line(self, text: str) -> None:
        """A line of results."""
        if self._bar is not None and self._shared:
            self._bar.console.print(text, markup=False, soft_wrap=True)
        else:
            typer.echo(text)


@contextlib.contextmanager
def resumable(command: str, path: Path) -> Iterator[None]:
    """Whatever stops the work inside says how to go on.

    Args:
        command: what goes on with it.
        path: the run database.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\nStopped; everything recorded is in {path}. Go on with: {command}", err=True)
        raise typer.Exit(130) from None
    except UsageError:
        raise
    except CodError as error:
        typer.echo(f"Error: {error}", err=True)
        if path.is_file():
            typer.echo(f"What was recorded is in {path}. Go on with: {command}", err=True)
        raise typer.Exit(1) from error


def command_line(*words: object) -> str:
    """Words as they can be pasted into a shell."""
    return shlex.join(str(word) for word in words)
