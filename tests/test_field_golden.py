"""Files of earlier releases: they open, migrate, verify, go on, and can be read as they are. tests/golden has one of each."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cod_agent import CoDAgent, Memory, Task, tool
from cod_agent.context import message
from cod_agent.environments import FrozenLake
from cod_agent.errors import NotADatabase
from cod_agent.memory import schema
from cod_agent.memory.projection import projection
from cod_agent.memory.readonly import look
from cod_agent.memory.verify import verify
from cod_agent.models.scripted import ScriptedModel

GOLDEN = Path(__file__).with_name("golden")
RELEASED = sorted(GOLDEN.glob("v*.db"))
TABLES = ("runs", "contexts", "tasks", "episodes", "heads", "messages", "calls", "effects", "attempts", "commits")


@pytest.fixture(params=RELEASED, ids=lambda path: path.stem)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copy(request.param, tmp_path / "old.db"))


def rows(path: Path, like: Path) -> dict[str, list[Any]]:
    """Every row of a file, in the columns that another one has."""
    found = {}
    with sqlite3.connect(like) as before, sqlite3.connect(path) as now:
        for table in TABLES:
            columns = [row[1] for row in before.execute(f"PRAGMA table_info({table})")]
            found[table] = now.execute(f"SELECT {', '.join(columns)} FROM {table} ORDER BY 1, 2").fetchall()
    return found


def version(path: Path) -> int:
    with sqlite3.connect(path) as conn:
        return int(conn.execute("PRAGMA user_version").fetchone()[0])


def test_every_released_schema_but_the_newest_has_a_golden_file() -> None:
    assert [version(path) for path in RELEASED] == list(range(1, len(schema.MIGRATIONS)))


def test_a_golden_file_has_rows_of_every_kind(old: Path) -> None:
    with sqlite3.connect(old) as conn:
        assert all(conn.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in TABLES)
        whats = {row[0] for row in conn.execute("SELECT what FROM commits")}
        kinds = {row[0] for row in conn.execute("SELECT state FROM episodes")}
        forked = conn.execute("SELECT count(*) FROM contexts WHERE version = 0 AND parent_id IS NOT NULL").fetchone()[0]
        given = conn.execute("""SELECT count(*) FROM contexts WHERE sources LIKE '[{"given"%'""").fetchone()[0]
        exact = conn.execute("SELECT count(*) FROM calls WHERE inexact = '' AND logprobs IS NOT NULL").fetchone()[0]
        tools = conn.execute("SELECT count(*) FROM effects WHERE kind = 'tool'").fetchone()[0]
    assert whats >= {"began", "solved", "judged", "updated", "kept", "closed"}
    assert kinds == {"live", "done", "refused", "aborted"}
    assert forked and given and exact > 20 and tools > 5
    assert old.stat().st_size < 200_000


def test_it_migrates_and_says_what_it_said(old: Path) -> None:
    before = shutil.copy(old, old.with_name("before.db"))
    read = projection(old)
    Memory.open(old).close()
    assert version(old) == len(schema.MIGRATIONS)
    assert rows(old, before) == rows(before, before)
    assert projection(old) == read and len(read) > 200
    assert verify(old).faults == []


def test_who_only_reads_leaves_it_as_it_is(old: Path) -> None:
    before = old.read_bytes()
    assert verify(old).faults == []
    with look(old) as conn:
        assert conn.execute("SELECT count(*) FROM tombstones").fetchone() == (0,)
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            conn.execute("DELETE FROM attempts")
    assert old.read_bytes() == before


def test_an_empty_file_is_still_called_empty(tmp_path: Path) -> None:
    (tmp_path / "empty.db").touch()
    with pytest.raises(NotADatabase, match="is empty"), look(tmp_path / "empty.db"):
        pass


async def test_what_stood_open_goes_on(old: Path) -> None:
    """The task whose process died: what it recorded is not done again, the tool in doubt is asked about."""
    ran: list[Any] = []

    async def fruit(name: str) -> int:
        ran.append(name)
        return 0

    @tool(on_crash="ask")
    async def pay(amount: int) -> str:
        ran.append(amount)
        return "paid"

    async def paying(task: Task, context: str, tools: Any) -> str:
        count = await tools[0]("apple")
        try:
            await tools[0]("durian")
        except Exception as error:
            count = f"{count}, {type(error).__name__}"
        await tools.ask([message("user", ("application", f"{task.prompt} There is {count}."))])
        return str(await tools[1](5))

    def must_not(messages: Any) -> str:
        raise AssertionError("the recorded answer is asked for again")

    model = ScriptedModel("words", must_not, form="natural")
    kit = {"solver": paying, "tools": [fruit, pay], "on_doubt": lambda name, arguments: "repeat"}
    async with CoDAgent("dies", model=model, memory=old, **kit) as agent:  # type: ignore[arg-type]
        outcome = await agent.solve(Task(id="errand-3", prompt="Buy fruit number 3."), position=0)
    assert (outcome.answer, ran) == ("paid", [5])
    assert verify(old).faults == []


async def test_a_life_goes_on_where_it_was(old: Path) -> None:
    lake = FrozenLake("tiny", seed=3, form="compact")
    with look(old) as conn:
        lived = conn.execute("SELECT count(*) FROM calls").fetchone()
    async with CoDAgent("lake", model="embedded", memory=old, environment=lake) as agent:
        outcomes = [outcome async for outcome in agent.run(lake.pack(3))]
        assert [outcome.version for outcome in outcomes] == [1, 2, 2]
        with look(old) as conn:
            assert conn.execute("SELECT count(*) FROM calls").fetchone() == lived, "nothing was lived again"
        async for _ in agent.run(lake.pack(2, 7), run="new", fork=(lake.pack(3).id, 2)):
            pass
    assert verify(old).faults == []


MIGRATING = """
import os, shutil, signal, sqlite3, sys
from cod_agent.memory import database, schema
class Dying(sqlite3.Connection):
    def execute(self, *said):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().execute(*said)
connect = sqlite3.connect
sqlite3.connect = lambda *said, **more: connect(*said, **more, factory=Dying)
import sqlite_utils
from cod_agent.memory.database import Memory
for number in range(1, 1000, 3):
    shutil.copyfile(sys.argv[1], f"{sys.argv[1]}.{number}")
    pid = os.fork()
    if pid == 0:
        left = number
        Memory(f"{sys.argv[1]}.{number}", durable=False).close()
        os._exit(0)
    if os.waitpid(pid, 0)[1] == 0:
        print(number)
        break
"""


def test_a_migration_that_is_killed_at_any_statement_goes_on(old: Path) -> None:
    """At every third one, which takes a third of the time."""
    done = subprocess.run([sys.executable, "-c", MIGRATING, str(old)], capture_output=True, text=True, check=True)
    killed = range(1, int(done.stdout), 3)
    assert len(killed) > 10
    said = rows(old, old)
    for number in killed:
        left = old.with_name(f"old.db.{number}")
        Memory(left, durable=False).close()
        assert version(left) == len(schema.MIGRATIONS)
        assert rows(left, old) == said
    assert verify(left).faults == []
