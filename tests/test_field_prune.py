"""Pruning: words of old tasks go, what was committed stays, the file verifies, and nobody loses what is still needed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cod_agent import CoDAgent, Memory, Sampling, Task
from cod_agent.cli import app
from cod_agent.context import message
from cod_agent.environments import FrozenLake
from cod_agent.errors import UsageError, VerificationFailed
from cod_agent.memory.content import rebuild_request
from cod_agent.memory.merge import Merged, merge
from cod_agent.memory.projection import projection
from cod_agent.memory.prune import LIVED, NEWEST, UNSETTLED, UNTRAINED, Pruned, prune, would_prune
from cod_agent.memory.readonly import look
from cod_agent.memory.verify import verify
from cod_agent.models import resolve
from cod_agent.models.scripted import ScriptedModel

LAKE = FrozenLake("tiny", seed=3, form="compact")
TASKS = [Task(id=f"t{number}", prompt=f"Count to {number}. {'Slowly. ' * 40}") for number in range(4)]
LATER = time.time() + 1e6


def said(messages: Any) -> str:
    return "<context>\ncount\n</context>" if "new note" in messages[-1].content else f"counted {len(messages)}"


async def solver(task: Task, context: str, tools: Any) -> str:
    number = await tools[0](int(task.id[1:]))
    completion = await tools.ask([message("user", ("application", f"{task.prompt} {number}"))])
    return str(completion.text)


async def count(number: int) -> str:
    """Count."""
    return f"a tool counted to {number}"


async def live(memory: Memory | Path, run: str = "life", tasks: int = 4, agent: str = "counter") -> list[Any]:
    model = ScriptedModel("words", said, form="natural")
    async with CoDAgent(agent, model=model, memory=memory, solver=solver, tools=[count]) as living:
        outcomes = []
        for at in range(tasks):
            outcome = await living.solve(TASKS[at], run=run, position=at)
            known = outcome.update != "none"
            outcomes.append(outcome if known else await living.feedback(outcome, 1.0, "thank you", run=run))
        return outcomes


@pytest.fixture
async def lived(tmp_path: Path) -> Path:
    await live(tmp_path / "life.db")
    return tmp_path / "life.db"


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pack with exact tokens, and the same one under another name."""
    path = tmp_path_factory.mktemp("exact") / "exact.db"
    model = resolve("embedded", sampling=Sampling(seed=1))
    for run in ("one", "two"):
        with CoDAgent("lake", model=model, memory=path) as agent:
            list(agent.run_sync(LAKE.pack(3), run=run))
    model.close()
    return path


def pruned(path: Path, before: float = LATER, **how: Any) -> Pruned:
    memory = Memory(path, durable=False)
    done = prune(memory, before, **how)
    memory.close()
    return done


def rebuilt(path: Path) -> int:
    """How many requests can be rebuilt."""
    with look(path) as conn:
        good = 0
        for (call,) in conn.execute("SELECT id FROM calls").fetchall():
            with contextlib.suppress(VerificationFailed):
                good += bool(rebuild_request(conn, call))
    return good


def chain(path: Path, run: str) -> str:
    with look(path) as conn:
        query = "SELECT chain FROM commits c JOIN runs r ON r.id = c.run_id WHERE r.name = ? ORDER BY seq DESC LIMIT 1"
        return str(conn.execute(query, (run,)).fetchone()[0])


async def test_words_go_and_what_was_committed_stays(lived: Path) -> None:
    with look(lived) as conn:
        before = {
            name: conn.execute(query).fetchall()
            for name, query in {
                "tasks": "SELECT name, body, state, answer, reward, feedback FROM tasks ORDER BY id",
                "contexts": "SELECT version, body, hash FROM contexts ORDER BY id",
                "hashes": "SELECT hash FROM calls UNION ALL SELECT hash FROM effects UNION ALL SELECT hash FROM messages",
                "commits": "SELECT seq, hash, chain FROM commits ORDER BY seq",
            }.items()
        }
        queries = {"commits": "SELECT seq, hash, chain FROM commits WHERE what <> 'pruned' ORDER BY seq"}
    done = pruned(lived)
    assert (done.tasks, done.kept) == (3, {NEWEST: 1})
    assert done.size > 3 * len(TASKS[0].prompt)
    with look(lived) as conn:
        queries |= {"tasks": "SELECT name, body, state, answer, reward, feedback FROM tasks ORDER BY id"}
        queries |= {"contexts": "SELECT version, body, hash FROM contexts ORDER BY id"}
        assert {name: conn.execute(query).fetchall() for name, query in queries.items()} == {
            name: before[name] for name in queries
        }
        assert conn.execute("SELECT count(*) FROM effects WHERE result IS NOT NULL").fetchone() == (1,)
        assert conn.execute("SELECT count(*) FROM calls WHERE envelope IS NOT NULL").fetchone() == (2,)
        detail = json.loads(conn.execute("SELECT detail FROM commits WHERE what = 'pruned'").fetchone()[0])
    assert detail["positions"] == [0, 1, 2] and detail["rows"]["effect"] == 3
    assert verify(lived).faults == []
    assert pruned(lived).tasks == 0, "there is nothing left to prune"


async def test_a_pruned_run_resumes_and_goes_on(lived: Path) -> None:
    pruned(lived)
    outcomes = await live(lived)
    assert [outcome.reward for outcome in outcomes] == [1.0] * 4
    assert [outcome.update for outcome in outcomes] == ["written"] * 4
    model = ScriptedModel("words", said, form="natural")
    async with CoDAgent("counter", model=model, memory=lived, solver=solver, tools=[count]) as living:
        outcome = await living.solve(Task(id="t4", prompt="Count to 4."))
    assert (outcome.position, outcome.context) == (4, "count")
    assert verify(lived).faults == []


async def test_what_is_said_again_is_stored_again_whoever_pruned(lived: Path) -> None:
    memory = Memory.open(lived, durable=False)  # as another process, which knows what it stored
    await live(memory, "before")
    pruned(lived)
    with look(lived) as conn:
        known = conn.execute("SELECT count(*) FROM calls").fetchone()[0]
    left = rebuilt(lived)
    await live(memory, "again")
    memory.close()
    with look(lived) as conn:
        calls = [row[0] for row in conn.execute("SELECT id FROM calls WHERE id > ?", (known,))]
        assert len(calls) == 8
        for call in calls:
            assert rebuild_request(conn, call)
    assert rebuilt(lived) > left + 8, "what the pruned calls had in common with them is back, too"
    assert verify(lived).faults == []
    assert pruned(lived).tasks == 3
    assert verify(lived).faults == []


def test_what_training_could_still_read_stays_until_it_was_read(exact: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(exact, tmp_path))
    assert pruned(path).kept == {UNTRAINED: 6}
    with look(path) as conn:
        assert would_prune(conn, LATER, even_untrained=True).tasks == 6
    kept = projection(path)
    one = pruned(path, trained={chain(path, "one")})
    assert (one.tasks, one.kept) == (3, {UNTRAINED: 3})
    assert verify(path).faults == []
    with pytest.raises(VerificationFailed, match="pruned"):
        projection(path)
    assert pruned(path, even_untrained=True).tasks == 3
    assert len(kept) > 30 and verify(path).faults == []


def test_only_what_was_committed_when_it_was_trained_on_goes(exact: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(exact, tmp_path))
    with look(path) as conn:
        query = "SELECT chain FROM commits WHERE run_id = 1 AND what = 'updated' AND position = 1"
        early = conn.execute(query).fetchone()[0]
    assert pruned(path, trained={early}).tasks == 2


def test_messages_that_another_run_needs_stay(exact: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(exact, tmp_path))
    with look(path) as conn:
        other = conn.execute("SELECT c.id FROM calls c JOIN episodes e ON e.id = c.episode_id WHERE e.run_id = 2")
        requests = {call: rebuild_request(conn, call) for (call,) in other.fetchall()}
    pruned(path, trained={chain(path, "one")})
    with look(path) as conn:
        assert {call: rebuild_request(conn, call) for call in requests} == requests


async def test_what_is_young_or_unsettled_or_lived_elsewhere_stays(lived: Path, tmp_path: Path) -> None:
    assert pruned(lived, before=time.time() - 60).kept == {UNSETTLED: 4}
    model = ScriptedModel("words", said, form="natural")
    async with CoDAgent("counter", model=model, memory=lived, solver=solver, tools=[count]) as living:
        await living.solve(Task(id="t4", prompt="Count to 4."))  # waits for feedback
    with sqlite3.connect(lived) as conn:
        ends = (time.time() + 50, time.monotonic() + 50)
        conn.execute("INSERT INTO leases VALUES (1, 'somebody', 'elsewhere', 1, ?, NULL)", ends[:1])
    assert pruned(lived).kept == {UNSETTLED: 1, LIVED: 4}
    with sqlite3.connect(lived) as conn:
        conn.execute("DELETE FROM leases")
    assert pruned(lived).kept == {UNSETTLED: 1}
    assert verify(lived).faults == []


KILLED = """
import sys
from cod_agent import Memory
from cod_agent.memory import prune
prune._AT_ONCE = 1
bury = prune.bury
def slow(*said):
    print("burying", flush=True)
    sys.stdin.readline()
    return bury(*said)
prune.bury = slow
prune.prune(Memory(sys.argv[1]), 1e12)
"""


async def test_a_pruning_that_is_killed_leaves_a_sound_file_and_is_finished_later(lived: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(lived)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    assert process.stdout.readline() == "burying\n"
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "burying\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    report = verify(lived)
    assert report.faults == [] and report.counts["tombstones"] > 3
    assert pruned(lived).tasks == 2
    assert verify(lived).faults == []


async def test_after_a_vacuum_the_words_are_nowhere_in_the_file(lived: Path) -> None:
    before = lived.stat().st_size
    assert b"a tool counted to 2" in lived.read_bytes()
    done = CliRunner().invoke(app, ["prune", str(lived), "--older-than", "0m", "--vacuum"])
    assert done.exit_code == 0 and done.output.startswith("3 tasks gave up"), done.output
    left = b"".join(path.read_bytes() for path in lived.parent.iterdir())
    assert b"a tool counted to 2" not in left
    assert b"a tool counted to 3" in left, "the newest task keeps its words"
    assert lived.stat().st_size < before
    assert verify(lived).faults == []


def test_a_dry_run_of_an_older_file_does_not_migrate_it(tmp_path: Path) -> None:
    old = Path(shutil.copy(Path(__file__).with_name("golden") / "v1.db", tmp_path))
    before = old.read_bytes()
    done = CliRunner().invoke(app, ["prune", str(old), "--older-than", "0m", "--even-untrained", "--dry-run"])
    assert done.exit_code == 0 and "would give up" in done.output, done.output
    assert old.read_bytes() == before


async def test_the_command_says_what_it_would_do(lived: Path, exact: Path) -> None:
    invoke = CliRunner().invoke
    done = invoke(app, ["prune", str(lived), "--older-than", "0m", "--dry-run", "--json"])
    told = json.loads(done.stdout)
    assert (told["tasks"], told["kept"], told["dry_run"]) == (3, {NEWEST: 1}, True)
    assert verify(lived).pruned == 0
    done = invoke(app, ["prune", str(exact), "--older-than", "0m"])
    assert "6 tasks keep all: could still be trained on" in done.output and "--even-untrained" in done.output
    for wrong in ("30", "d", "-1d"):
        done = invoke(app, ["prune", str(lived), f"--older-than={wrong}"])
        assert done.exit_code == 1 and "is no age" in done.output
    done = invoke(app, ["prune", str(lived.with_name("none.db")), "--older-than", "1d"])
    assert done.exit_code == 1 and "there is no file" in done.output


async def test_a_pruned_run_is_merged_as_it_is(lived: Path, tmp_path: Path) -> None:
    pruned(lived)
    memory = Memory.open(tmp_path / "all.db", durable=False)
    assert merge(memory, lived) == Merged(1, 0, 0)
    assert merge(memory, lived) == Merged(0, 0, 1)
    memory.close()
    there, here = verify(lived), verify(tmp_path / "all.db")
    assert here.faults == [] and here.counts == there.counts and here.pruned == there.pruned > 0


async def test_pruning_elsewhere_prunes_our_copy_but_for_what_others_need(lived: Path, tmp_path: Path) -> None:
    pruned_copy = Path(shutil.copy(lived, tmp_path / "pruned.db"))
    pruned(pruned_copy)
    await live(lived, "other", 2)
    memory = Memory.open(lived, durable=False)
    assert merge(memory, pruned_copy) == Merged(0, 1, 0)
    memory.close()
    assert verify(lived).faults == []
    with look(lived) as conn:
        query = "SELECT c.id FROM calls c JOIN episodes e ON e.id = c.episode_id JOIN runs r ON r.id = e.run_id WHERE r.name = ?"
        assert all(rebuild_request(conn, call) for (call,) in conn.execute(query, ("other",)).fetchall())
        texts = "".join(row[0] for row in conn.execute("SELECT body FROM messages WHERE body IS NOT NULL"))
    assert "counted to 1" in texts and "counted to 2" not in texts and "counted to 3" in texts


def test_runs_whose_texts_went_together_are_merged_together(exact: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(exact, tmp_path))
    pruned(path, trained={chain(path, "one")})
    pruned(path, even_untrained=True)
    memory = Memory.open(tmp_path / "all.db", durable=False)
    with pytest.raises(UsageError, match="merge all runs"):
        merge(memory, path, only={("lake", "one")})
    assert merge(memory, path) == Merged(2, 0, 0)
    memory.close()
    assert verify(tmp_path / "all.db").faults == []
