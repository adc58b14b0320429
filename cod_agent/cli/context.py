"""`cod context`: the history of an agent's context. Every version is kept; nothing here writes (`cod_agent.cli.review` does)."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cod_agent.cli import options
from cod_agent.cli.forget import forget
from cod_agent.cli.output import command_line, console, counted, print_json, say
from cod_agent.cli.review import blame, canary, fork, review, rollback
from cod_agent.errors import UnknownName, UsageError
from cod_agent.trust.plain import visible

if TYPE_CHECKING:
    from cod_agent.memory.history import Version

app = typer.Typer(
    no_args_is_help=True,
    help="The history of an agent's context.\n\nExample: cod context log lake.db",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("forget")(forget)
app.command("review")(review)
app.command("canary")(canary)
app.command("rollback")(rollback)
app.command("fork")(fork)
app.command("blame")(blame)


@app.command("log")
def log(db: options.Db, agent: options.Whose = None, run: options.OfRun = None, as_json: options.Json = False) -> None:
    """List the versions of a run's context, or the runs of a file that has many.

    Example: cod context log lake.db --run frozen-lake:small/eval/1/0
    """
    from cod_agent.memory import history
    from cod_agent.memory.readonly import look

    with look(db) as conn:
        found = history.find(conn, agent, run)
        named = history.meant(found)
        if len(named) != 1:
            return _runs(found, db, as_json)
        chosen = named[0]
        steps = history.steps(conn, chosen)
    if as_json:
        return print_json({"agent": chosen.agent, "run": chosen.name, "steps": [step.json() for step in steps]})
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("task", "reward", "update", "version", "hash", "by", "context"):
        table.add_column(name, justify="right" if name in ("reward", "version") else "left", overflow="fold")
    for step in steps:
        reward = "" if step.reward is None else f"{step.reward:g}"
        update = f"{step.update}: {step.reason}" if step.update in ("kept", "held") else step.update
        table.add_row(
            str(step.position),
            reward,
            Text(visible(update)),
            str(step.version),
            step.hash[:8],
            Text(step.weights.partition("/")[0][:48]),
            Text(visible(step.body) or (f"({step.gone})" if step.gone else "")),
        )
    say(f"{chosen.agent}, {chosen.name}")
    console().print(table)
    if others := [one.name for one in found if one is not chosen]:
        say(f"Beside it there are runs that canaries and forgetting lived (--run): {', '.join(others)}")
    return None


@app.command("show")
def show(
    db: options.Db,
    agent: options.Whose = None,
    run: options.OfRun = None,
    version: Annotated[int | None, typer.Option("--version", help="Which; the newest if left out.")] = None,
    as_json: options.Json = False,
) -> None:
    """Show one version of a context, as it is: good for a pipe.

    Example: cod context show lake.db --run frozen-lake:small/eval/1/0 --version 2
    """
    found = _version(db, agent, run, version)
    if as_json:
        return print_json(found.json())
    if found.gone:
        raise UsageError(f"version {found.version} was {found.gone}: its text is gone, its hash is {found.hash[:8]}")
    return typer.echo(visible(found.body) if sys.stdout.isatty() else found.body)


@app.command("diff")
def diff(
    db: options.Db,
    agent: options.Whose = None,
    run: options.OfRun = None,
    version: Annotated[
        list[int] | None,
        typer.Option("--version", help="Give it twice: from, to. Once: from the one before. Left out: the newest two."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show what changed between two versions, as a unified diff.

    Example: cod context diff lake.db --run frozen-lake:small/eval/1/0 --version 1 --version 3
    """
    asked = version or []
    if len(asked) > 2:
        raise UsageError("a diff is between two versions: give --version at most twice")
    new = _version(db, agent, run, asked[-1] if asked else None)
    old = _version(db, agent, run, asked[0] if len(asked) == 2 else max(new.version - 1, 0))
    lines = list(
        difflib.unified_diff(
            old.body.splitlines(),
            new.body.splitlines(),
            f"version {old.version} ({old.hash[:8]})",
            f"version {new.version} ({new.hash[:8]})",
            lineterm="",
        )
    )
    if as_json:
        return print_json({"from": old.json(), "to": new.json(), "diff": "\n".join(lines)})
    if not lines:
        return say(f"versions {old.version} and {new.version} are the same")
    styles = {"+": "green", "-": "red", "@": "cyan"}
    for line in lines:
        console().print(line, style=styles.get(line[:1], ""), soft_wrap=True)
    return None


def _version(db: Path, agent: str | None, run: str | None, version: int | None) -> Version:
    from cod_agent.memory import history
    from cod_agent.memory.readonly import look

    with look(db) as conn:
        found = history.meant(history.find(conn, agent, run))
        if len(found) != 1:
            names = ", ".join(f"{one.agent} {one.name}" for one in found[:3]) + (", ..." if found[3:] else "")
            raise UsageError(
                f"{db} has {len(found)} runs ({names}): say which by --agent and --run; "
                f"{command_line('cod', 'context', 'log', db)} lists them"
            )
        return history.version(conn, found[0], version)


def _runs(found: list[Any], db: Path, as_json: bool) -> None:
    if not found:
        raise UnknownName(f"{db} holds no runs yet")
    if as_json:
        return print_json({"runs": [one.json() for one in found]})
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("agent", "run", "tasks", "reward", "versions"):
        table.add_column(name, justify="left" if name in ("agent", "run") else "right", no_wrap=True)
    table.add_column("newest context", no_wrap=True, overflow="ellipsis", max_width=44)
    for one in found:
        mean = "" if one.mean is None else f"{one.mean:.2f}"
        newest = " / ".join(one.newest.splitlines())
        table.add_row(one.agent, Text(one.name), str(one.tasks), mean, str(one.versions), Text(newest))
    console().print(table)
    more = command_line("cod", "context", "log", db, "--agent", found[0].agent, "--run", found[0].name)
    return say(f"{counted(len(found), 'run')}. One of them in full: {more}")


__all__ = ["app"]
