"""README.md and docs/ say what is so: their code runs, their commands exist, their links lead somewhere, nothing is
left out.

A page is executed from top to bottom in a folder of its own. ```python blocks share one namespace; a ```text block
right below one is what it prints. ```console blocks are commands with their output. `openai:` models answer from a
scripted server.
A comment on the line above a block changes that:

    <!-- not run: why -->       it is read (commands are still parsed), not executed
    <!-- output varies -->      it is executed, what it prints is not compared
    <!-- exits 1 -->            the last command of the block ends with this code
    <!-- needs: package -->     skipped where the package is not installed

`...` in an output stands for anything.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import inspect
import io
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import cod_agent
from cod_agent import errors

sys.path.insert(0, str(Path(__file__).parent))
from servers import ScriptedServer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


CHECKER = doctest.OutputChecker()
LOOSE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

_FENCE = re.compile(r"^(?P<notes>(?:<!--[^\n]*-->\n)*)```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_NOTE = re.compile(r"<!-- (.*?) -->")
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*$")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    kind: str
    body: str
    line: int
    notes: tuple[str, ...]
    below: bool
    """Nothing stands between it and the block above."""

    def said(self, word: str) -> str | None:
        """What follows `word` in the comments above it; None if they do not say it."""
        return next((note[len(word) :].strip(": ") for note in self.notes if note.startswith(word)), None)

    @property
    def compared(self) -> bool:
        return self.said("output varies") is None

    @property
    def runs(self) -> bool:
        needed = self.said("needs")
        return self.said("not run") is None and (needed is None or importlib.util.find_spec(needed) is not None)


def blocks(page: Path) -> list[Block]:
    text, found, end = page.read_text(), [], 0
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("body")) + 1
        notes = tuple(_NOTE.findall(match["notes"]))
        found.append(Block(match["kind"], match["body"], line, notes, not text[end : match.start()].strip()))
        end = match.end()
    return found


def commands(body: str) -> list[tuple[str, str]]:
    """(command, its output) pairs of a console block."""
    pairs: list[tuple[str, str]] = []
    for line in body.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            pairs.append((line[2:], ""))
        elif pairs:
            pairs[-1] = (pairs[-1][0], f"{pairs[-1][1]}{line}\n")
    return pairs


def words(command: str) -> list[str]:
    """The command's words, without variables set before it and what the shell would take."""
    said = shlex.split(command, comments=True)
    while said and _ASSIGNMENT.match(said[0]):
        said = said[1:]
    return said[: next((at for at, word in enumerate(said) if word in ("|", ">", "&&", ";")), len(said))]


# ---- every page runs ----


def reply(request: dict[str, Any], n: int) -> str:
    asked = str(request["messages"])
    return "<context>\nDirection 3 is left.\n</context>" if "write" in asked.lower() else "<answer>3</answer>"


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(reply) as made:
        yield made


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: ScriptedServer) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    space: dict[str, Any] = {"__name__": "docs"}
    printed: str | None = None
    for block in blocks(page):
        if block.kind == "text" and block.below and printed is not None and block.compared:
            agree(block.body, printed, f"{page.name}:{block.line}")
        printed = None
        if block.kind == "python" and block.runs:
            printed = run_python(block, page, space)
        if block.kind == "console" and block.runs:
            run_console(block, page)


def run_python(block: Block, page: Path, space: dict[str, Any]) -> str:
    out = io.StringIO()
    code = compile("\n" * (block.line - 1) + block.body, str(page), "exec", dont_inherit=True)
    with contextlib.redirect_stdout(out):
        exec(code, space)  # noqa: S102 (our own pages)
    return out.getvalue()


def run_console(block: Block, page: Path) -> None:
    pairs = commands(block.body)
    for command, expected in pairs:
        where, said = f"{page.name}:{block.line}: {command}", words(command)
        runner = {"cod": cod, "mkdir": mkdir, "sqlite-utils": sqlite_utils}.get(said[0])
        if runner is None:
            continue
        code, output = runner(said[1:])
        wanted = int(block.said("exits") or 0) if command == pairs[-1][0] else 0
        assert code == wanted, f"{where} ended with {code}\n{output}"
        if block.compared and expected:
            agree(expected, output, where)


def cod(arguments: list[str]) -> tuple[int, str]:
    from typer.testing import CliRunner

    from cod_agent.cli import app

    result = CliRunner().invoke(app, arguments, prog_name="cod")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def mkdir(arguments: list[str]) -> tuple[int, str]:
    for folder in arguments:
        Path(folder).mkdir()
    return 0, ""


def sqlite_utils(arguments: list[str]) -> tuple[int, str]:
    from click.testing import CliRunner
    from sqlite_utils.cli import cli

    result = CliRunner().invoke(cli, arguments)
    return result.exit_code, result.output


def agree(expected: str, got: str, where: str) -> None:
    if not CHECKER.check_output(expected, got, LOOSE):
        raise AssertionError(f"{where} says\n{expected}\nand it is\n{got}")


# ---- every command exists ----


def root() -> Any:
    import typer

    from cod_agent.cli import app

    return typer.main.get_command(app)


def parse_cod(said: list[str], where: str, *, whole: bool) -> None:
    """The words after `cod` name a command and flags it has; with `whole`, they are a command line it takes."""
    import typer

    group, rest = root(), said
    context = typer.Context(group, info_name="cod")
    while hasattr(group, "get_command") and rest and not rest[0].startswith("-"):
        found = group.get_command(context, rest[0])
        assert found is not None, f"{where}: there is no command {rest[0]!r}"
        group, rest = found, rest[1:]
    known = {name for parameter in group.params for name in parameter.opts} | {"--help", "-h"}
    unknown = {word.partition("=")[0] for word in rest if word.startswith("--")} - known
    assert not unknown, f"{where}: no such flag {unknown}"
    if whole and not hasattr(group, "get_command"):
        group.make_context("cod", list(rest), parent=context)


def parse_tiny(said: list[str], where: str) -> None:
    import typer

    from cod_train.tiny.__main__ import app

    found = typer.main.get_command(app).commands.get(said[0])  # type: ignore[attr-defined]
    assert found is not None, f"{where}: there is no command {said[0]!r}"
    found.make_context(said[0], said[1:])


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_exist(page: Path) -> None:
    text = page.read_text()
    makefile = (ROOT / "Makefile").read_text()
    shown = [(f"{page.name}:{b.line}", c) for b in blocks(page) if b.kind == "console" for c, _ in commands(b.body)]
    for where, command in shown:
        said = words(command)
        if said[:1] == ["cod"]:
            parse_cod(said[1:], f"{where}: {command}", whole=True)
        if said[:3] == ["python", "-m", "cod_train.tiny"]:
            parse_tiny(said[3:], f"{where}: {command}")
        if said[:1] == ["make"]:
            assert f"\n{said[1]}:" in makefile, f"{where}: no such target {said[1]}"
    for inline in re.findall(r"`(cod [^`\n]+)`", text):
        parse_cod([word for word in words(inline)[1:] if not word.isupper()], f"{page.name}: {inline}", whole=False)
    for target in re.findall(r"`make ([\w-]+)`", text):
        assert f"\n{target}:" in makefile, f"{page.name}: no such target {target}"


def test_extras_exist() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for page in PAGES:
        for named in re.findall(re.escape(project["name"]) + r"\[([\w,]+)\]", page.read_text()):
            assert set(named.split(",")) <= set(project["optional-dependencies"]), f"{page.name}: [{named}]"


def test_every_command_and_flag_is_described() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()

    def walk(name: str, command: Any) -> Iterator[str]:
        if hasattr(command, "commands"):
            for sub, inner in command.commands.items():
                yield from walk(f"{name} {sub}", inner)
        else:
            yield f"`{name}`" if name != "cod" else ""
            yield from (option for parameter in command.params for option in parameter.opts if option.startswith("--"))

    missing = {said for said in walk("cod", root()) if said not in text}
    assert not missing, f"docs/cli.md does not describe {sorted(missing)}"


def test_the_readme_shows_the_demo_as_it_is() -> None:
    default = next(param.default for param in root().commands["demo"].params if param.name == "packs")
    assert f"through {default} packs" in (ROOT / "README.md").read_text()


# ---- nothing is left out ----


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target} leads nowhere"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name}: {target} leads nowhere"


def test_every_page_is_in_the_index() -> None:
    pages = [page for page in PAGES[1:] if page.name != "README.md"]
    assert not [page.name for page in pages if f"({page.name})" not in (page.parent / "README.md").read_text()]


def test_every_public_name_is_in_the_docs() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    missing = [name for name in cod_agent.__all__ if not re.search(rf"`[^`\n]*\b{name}\b[^`\n]*`", text)]
    assert not missing, f"nobody reads of {missing}"


def test_every_column_is_described() -> None:
    import sqlite3

    from cod_agent.memory.schema import migrate

    conn = sqlite3.connect(":memory:", isolation_level=None)
    migrate(conn)
    page = (ROOT / "docs" / "memory.md").read_text()
    sections = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL))
    tables = [row[0] for row in conn.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    for table in (name for name in tables if not name.startswith(("sqlite_", "_"))):
        columns = {row[1] for row in conn.execute(f"PRAGMA table_info({table})")}
        described = set(re.findall(r"^\| `(\w+)`", sections.get(table, ""), re.MULTILINE))
        assert described == columns, f"{table}: {described ^ columns}"


def drawn_tree() -> dict[str, str]:
    """Each error of the drawn tree, and the one it hangs on."""
    parents: list[tuple[int, str]] = []
    tree: dict[str, str] = {}
    for line in (inspect.getdoc(errors) or "").splitlines():
        found = re.match(r"^[\s│]*(?:[├└]── )?([A-Z]\w+)", line)
        if found and ("──" in line or line.strip() == "CodError"):
            depth = line.index(found[1])
            parents = [(at, name) for at, name in parents if at < depth]
            tree[found[1]] = parents[-1][1] if parents else ""
            parents.append((depth, found[1]))
    return tree


def test_every_error_is_in_the_drawn_tree() -> None:
    defined = {
        name: kind.__bases__[0].__name__
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, errors.CodError) and kind is not errors.CodError
    }
    tree = drawn_tree()
    assert tree.pop("CodError") == "" and tree == defined
    page = (ROOT / "docs" / "errors.md").read_text()
    assert not [name for name in defined if f"`{name}`" not in page]
