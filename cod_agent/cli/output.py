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
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cod_agent.errors import CodError, UsageError
from cod_agent.trust.plain import UNSEEN, visible

if TYPE_CHECKING:
    from rich.console import Console

EVERY = 10.0
"""Seconds between plain lines of progress."""
PIPED_WIDTH = 120


def say(text: str = "", *, err: bool = False) -> None:
    """A line for people. Names and errors may hold what others wrote: nothing in them commands a terminal."""
    typer.echo(visible(text), err=err)


def console(*, err: bool = False) -> Console:
    """Standard output (or error) as a rich console; wide enough when piped. What is printed there is no markup, and see `say`."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class Shown(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else visible(text), style, control)

    terminal = (sys.stderr if err else sys.stdout).isatty()
    return Shown(stderr=err, width=None if terminal else PIPED_WIDTH, highlight=False, soft_wrap=False, markup=False)


def counted(count: int, what: str) -> str:
    """How many of what: `1 task`, `2 tasks`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def print_json(value: Any) -> None:
    """The one JSON object of `--json`."""
    said = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    typer.echo(UNSEEN.sub(lambda found: json.dumps(found[0])[1:-1], said))


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
        self.at(self._done + 1, self._total, note)

    def at(self, done: int, total: int, note: str = "") -> None:
        """So many of so many are done."""
        self._done, self._total = done, total
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, note=note)
        elif time.monotonic() - self._said >= EVERY:
            self._said = time.monotonic()
            seconds = self._said - self._started
            what = f", {note}" if note else ""
            say(f"{self._what}: {self._done} of {self._total}, {seconds:.0f} s{what}", err=True)

    def line(self, text: str) -> None:
        """A line of results."""
        if self._bar is not None and self._shared:
            self._bar.console.print(text, soft_wrap=True)
        else:
            say(text)


@contextlib.contextmanager
def resumable(command: str, path: Path) -> Iterator[None]:
    """Whatever stops the work inside says how to go on; what is refused before anything was lived leaves nothing behind.

    Args:
        command: what goes on with it.
        path: the run database.
    """
    there, made = path.exists(), not path.parent.exists()
    try:
        yield
    except KeyboardInterrupt:
        say(f"\nStopped; everything recorded is in {path}. Go on with: {command}", err=True)
        raise typer.Exit(130) from None
    except UsageError:
        if not there and path.exists() and _empty(path):
            for end in ("", "-wal", "-shm", ".lock"):
                path.with_name(path.name + end).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                if made:
                    path.parent.rmdir()
        raise
    except CodError as error:
        say(f"Error: {error}", err=True)
        if path.is_file():
            say(f"What was recorded is in {path}. Go on with: {command}", err=True)
        raise typer.Exit(1) from error
    except Exception as error:  # of a world, a solver or a model that is not ours: its own frames are the last ones
        said = "".join(traceback.format_exception(error, limit=-2)).rstrip()
        say(f"{said}\nWhat was recorded is in {path}. Mend it, and go on with: {command}", err=True)
        raise typer.Exit(1) from error


def _empty(path: Path) -> bool:
    """Whether a run database holds no run."""
    from cod_agent.memory.readonly import look

    with look(path) as conn:
        return not conn.execute("SELECT EXISTS (SELECT 1 FROM runs)").fetchone()[0]


def command_line(*words: object) -> str:
    """Words as they can be pasted into a shell."""
    return shlex.join(str(word) for word in words)
