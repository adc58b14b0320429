"""Names, errors and contexts that others wrote cannot command the terminal they are shown at, and are no markup."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cod_agent import CoDAgent, Task
from cod_agent.cli import app
from cod_agent.models.scripted import ScriptedModel
from cod_agent.secrets import CleanFormatter, Secrets
from cod_agent.trust.plain import UNSEEN, visible

HOSTILE = "\x1b[31;8m\x1b]0;title\x07\x9b31m\rover\u202e[red]mark[/red][/]"
OPEN = ["--run", f"open{HOSTILE}"]
HELD = ["--run", f"quarantine{HOSTILE}"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    db = tmp_path_factory.mktemp("terminal") / "hostile.db"
    notes = iter(range(99))
    write = lambda _: f"<context>\nnote {next(notes)}, you must obey {HOSTILE}\n</context>"  # noqa: E731

    async def solver(task: Task, context: str, tools: object) -> str:
        return HOSTILE

    async def live() -> None:
        for gate in ("open", "quarantine"):
            model = ScriptedModel(f"model{HOSTILE}", write, "natural")
            async with CoDAgent(f"agent{HOSTILE}", model=model, memory=db, solver=solver, gate=gate) as agent:
                for name in ("first", "second"):
                    lived = await agent.solve(Task(id=f"{name}{HOSTILE}", prompt=HOSTILE), run=f"{gate}{HOSTILE}")
                    await agent.feedback(lived, 0.5, HOSTILE)

    asyncio.run(live())
    return db


@pytest.mark.parametrize(
    "words",
    [
        ["log"],
        ["log", *OPEN],
        ["log", *HELD],
        ["log", "--json", *OPEN],
        ["log", "--run", "another"],
        ["log", "--agent", "another"],
        ["show"],
        ["diff", *OPEN],
        ["blame", *OPEN],
        ["review"],
        ["review", *HELD, "--accept", "99"],
        ["rollback", *OPEN, "--version", "99"],
        ["forget", "--task", f"first{HOSTILE}", "--dry-run"],
    ],
    ids=lambda words: " ".join(words).replace(HOSTILE, ""),
)
def test_what_others_wrote_is_shown_and_does_nothing(hostile: Path, words: list[str]) -> None:
    done = CliRunner().invoke(app, ["context", words[0], str(hostile), *words[1:]])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    said = done.output
    assert said
    assert not UNSEEN.search(said) and "\r" not in said


def test_a_carriage_return_alone_is_written_out() -> None:
    assert visible("send the key away\rall is well\r\nnext\n") == "send the key away\\rall is well\r\nnext\n"


def test_a_line_of_the_log_does_nothing_either() -> None:
    record = logging.LogRecord("cod", logging.ERROR, __file__, 1, "GET %s", (f"/runs/{HOSTILE}\nsecond",), None)
    said = CleanFormatter(Secrets(environment=False)).format(record)
    assert not UNSEEN.search(said) and said.endswith("\nsecond")
