"""`cod doctor`: is this installation, or a run database and the place it lies in, in order?"""

from __future__ import annotations

import platform
import re
import shutil
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cod_agent.cli.output import console, print_json

if TYPE_CHECKING:
    from cod_agent.memory.health import Finding

_PACKAGE = "connect-the-dots"
_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def doctor(
    db: Annotated[
        Path | None, typer.Argument(metavar="[DB]", help="A run database; without one, the installation.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Read every page and check every hash; takes longer.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Look over the installation, or a run database and the place it lies in, and say what to do.

    Exit code 0: no problem, though there may be warnings; 1: a problem. Nothing is written.

    Example: cod doctor lake.db
    """
    from cod_agent.memory.health import examine

    found = installation() if db is None else examine(db, full=full)
    bad = any(finding.level == "problem" for finding in found)
    if as_json:
        print_json({"path": db and str(db), "ok": not bad, "findings": [finding.json() for finding in found]})
    else:
        _tell(found)
    if bad:
        raise typer.Exit(1)


def installation() -> list[Finding]:
    """Python, SQLite, this package and what it may use."""
    from cod_agent.memory.health import Finding, sqlite

    found = [
        Finding("Python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding(_PACKAGE, "ok", metadata.version(_PACKAGE)),
        sqlite(),
    ]
    for extra, packages in _asked().items():
        there = {name: version for name in packages if (version := _version(name))}
        missing = [name for name in packages if name not in there]
        about, pip = (
            extra and f"extra {extra}" or "packages",
            f"pip install '{_PACKAGE}{f'[{extra}]' if extra else ''}'",
        )
        said = ", ".join(f"{name} {version}" for name, version in there.items())
        if not missing:
            found.append(Finding(about, "ok", said))
        elif not extra:
            found.append(Finding(about, "problem", f"missing: {', '.join(missing)}", pip))
        else:
            gap = f"not installed: {', '.join(missing)}"
            found.append(Finding(about, "ok", f"{said}; {gap}" if said else gap, f"if you want it: {pip}"))
    if shutil.which("bwrap"):
        found.append(Finding("sandbox", "ok", "bubblewrap is installed: agents may run commands in it"))
    else:
        do = "if agents should run commands: install bubblewrap (Linux)"
        found.append(Finding("sandbox", "ok", "there is no bubblewrap: tools that run commands refuse to", do))
    return found


def _asked() -> dict[str, list[str]]:
    """The packages this one asks for, by extra; "" for those it cannot do without."""
    asked: dict[str, list[str]] = defaultdict(list)
    for line in metadata.requires(_PACKAGE) or ():
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"""extra == ["']([\w-]+)["']""", line)
        if name and name[0] != _PACKAGE and not (extra and extra[1] == "dev"):
            asked[extra[1] if extra else ""].append(name[0])
    return asked


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _tell(found: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for finding in found:
        said = Text(finding.said)
        if finding.do:
            said.append(f"\n{finding.do}", style="italic")
        table.add_row(Text(finding.level, style=_STYLES[finding.level]), finding.about, said)
    console().print(table)
