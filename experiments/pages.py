"""The tables and figures of docs/results, made from the data beside them: `python experiments/pages.py [--check]`.

A page holds `<!-- EXPERIMENT TABLE -->`, the table, and `<!-- end -->`; what stands between is written here and nowhere else, so a page
cannot say other figures than the stored runs. `<!-- EXPERIMENT about -->` is how they came about. `--check` writes nothing and fails
if something would change.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Annotated

import lab
import typer

_BLOCK = re.compile(r"<!-- (?P<name>[a-z]+) (?P<table>[a-z0-9-]+) -->\n.*?<!-- end -->", re.DOTALL)


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if a page is not of its data.")] = False,
) -> None:
    """Example: python experiments/pages.py"""
    stale = []
    for page in sorted((lab.HOME / "docs" / "results").glob("*.md")):
        text = page.read_text()
        if (made := written(text)) != text:
            stale.append(page.name)
            if not check:
                page.write_text(made)
    if not check:
        for name in lab.EXPERIMENTS:
            experiment(name).draw(lab.load(name), lab.IMAGES / f"results-{name}.png")
    print(f"{'not of their data' if check else 'written'}: {', '.join(stale) or 'none'}")
    if check and stale:
        sys.exit(1)


def written(text: str) -> str:
    """A page with its tables as the data has them.

    Raises:
        KeyError: a page names a table that its experiment does not make.
    """

    def block(found: re.Match[str]) -> str:
        name, table = found["name"], found["table"]
        body = about(lab.load(name)["about"]) if table == "about" else tables(name)[table]
        return f"<!-- {name} {table} -->\n{body}\n<!-- end -->"

    return _BLOCK.sub(block, text)


@cache
def tables(name: str) -> dict[str, str]:
    """All tables of an experiment: a page has several, and resampling takes its time."""
    return experiment(name).tables(lab.load(name))


def about(said: lab.Found) -> str:
    """How an experiment came about, in a sentence."""
    packages = ", ".join(f"{name} {said[name]}" for name in ("torch", "verl", "numpy"))
    return (
        f"`{said['command']}`, {said['date']}, {said['machine']}, CPython {said['python']}, {packages}; its commands took "
        f"{said['minutes']:.0f} minutes together, as many at once as there are cores."
    )


def experiment(name: str) -> ModuleType:
    """The module of an experiment."""
    return import_module(name)


if __name__ == "__main__":
    typer.run(main)
