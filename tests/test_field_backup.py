"""Backups: one state of a file that is lived in, whole and verified or not there at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cod_agent import CoDAgent, Memory, Task
from cod_agent.cli import app
from cod_agent.environments import FrozenLake
from cod_agent.errors import NotADatabase, UsageError, VerificationFailed
from cod_agent.memory import backup as backing
from cod_agent.memory import lease
from cod_agent.memory.backup import backup
from cod_agent.memory.projection import projection
from cod_agent.memory.readonly import look
from cod_agent.memory.verify import verify
from cod_agent.models.scripted import ScriptedModel

LAKE = FrozenLake("tiny", seed=3, form="compact")

LIVING = """
import sys
from cod_agent import CoDAgent
from cod_agent.environments import FrozenLake
from cod_agent.models.scripted import ScriptedModel
lake = FrozenLake("tiny", seed=3, form="compact")
model = ScriptedModel("still", lambda messages: "Direction 1")
with CoDAgent("living", model=model, memory=sys.argv[1]) as agent:
    for pack in range(100000):
        list(agent.run_sync(lake.pack(2, pack)))
        print(pack, flush=True)
"""

COPYING = """
import sys
from cod_agent.memory import backup
backup._PAGES = 4
def slowly(done, total):
    print(done, flush=True)
    sys.stdin.readline()
backup.backup(sys.argv[1], sys.argv[2], force=True, progress=slowly)
"""


@pytest.fixture
def lived(tmp_path: Path) -> Path:
    path = tmp_path / "life.db"
    model = ScriptedModel("still", lambda messages: "Direction 1")
    with CoDAgent("a", model=model, memory=path) as agent:
        for pack in range(3):
            list(agent.run_sync(LAKE.pack(2, pack)))
    return path


def python(program: str, *arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def beside(path: Path) -> list[str]:
    return sorted(found.name for found in path.parent.iterdir())


def test_a_copy_says_the_same_and_is_one_file(lived: Path, tmp_path: Path) -> None:
    lived.chmod(0o640)
    copy = tmp_path / "copies" / "copy.db"
    report = backup(lived, copy)
    assert report.ok and report.path == str(copy) and report.counts["runs"] == 3
    assert projection(copy) == projection(lived)
    assert beside(copy) == ["copy.db"]
    assert copy.stat().st_mode & 0o777 == 0o640
    memory = Memory.open(copy)
    memory.close()
    assert verify(copy).ok


def test_agents_go_on_while_it_is_made_and_it_says_what_was_said_when_it_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, copy = tmp_path / "life.db", tmp_path / "copy.db"
    living = python(LIVING, path)
    assert living.stdout
    for _ in range(5):
        begun = int(living.stdout.readline())
    monkeypatch.setattr(backing, "_PAGES", 20)
    steps: list[int] = []

    def progress(done: int, total: int) -> None:
        if len(steps) < 4:
            steps.append(int(living.stdout.readline()))  # type: ignore[union-attr]

    try:
        report = backup(path, copy, progress=progress)
    finally:
        living.kill()
        living.communicate()
    assert len(steps) >= 2 and steps[-1] > begun, "packs were lived while it was copied"
    assert begun + 1 <= report.counts["runs"] <= begun + 3, "nothing of what came after its beginning is in it"
    chains = "SELECT r.name, c.seq, c.chain FROM commits c JOIN runs r ON r.id = c.run_id"
    with look(copy) as old, look(path) as new:
        assert set(old.execute(chains)) < set(new.execute(chains))
    assert verify(path).ok


def test_a_killed_backup_leaves_the_goal_as_it_was_and_the_next_one_clears_up(lived: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copies"
    folder.mkdir()
    goal = folder / "copy.db"
    goal.write_text("an older copy")
    copying = python(COPYING, lived, goal)
    assert copying.stdin and copying.stdout
    for _ in range(3):
        assert int(copying.stdout.readline()) > 0
        copying.stdin.write("\n")
        copying.stdin.flush()
    os.kill(copying.pid, signal.SIGKILL)
    copying.communicate()
    assert goal.read_text() == "an older copy"
    assert [name for name in beside(goal) if name.endswith(".part")] == [f".copy.db.{copying.pid}.part"]
    backup(lived, goal, force=True)
    assert beside(goal) == ["copy.db"] and verify(goal).ok


def test_what_is_there_is_not_replaced_unasked(lived: Path, tmp_path: Path) -> None:
    goal = tmp_path / "copy.db"
    backup(lived, goal)
    before = goal.read_bytes()
    with pytest.raises(UsageError, match="--force"):
        backup(lived, goal)
    with pytest.raises(UsageError, match="the file itself"):
        backup(lived, lived, force=True)
    link = tmp_path / "link.db"
    link.symlink_to(lived)
    for end in ("-wal", "-shm", "-journal", ".lock"):
        for path in (lived, link):
            with pytest.raises(UsageError, match="a part of it"):
                backup(path, f"{lived}{end}", force=True)
    with pytest.raises(UsageError, match="is a directory"):
        backup(lived, tmp_path)
    with pytest.raises(UsageError, match="there is no file"):
        backup(tmp_path / "none.db", tmp_path / "other.db")
    assert goal.read_bytes() == before


def test_a_file_that_is_lived_in_is_not_replaced_even_if_asked(lived: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    shutil.copy(lived, other)
    memory = Memory.open(other)
    memory.write_sync(lambda conn: lease.take(conn, 1, "a", "lived"))
    try:
        with pytest.raises(UsageError, match="other.db-wal"):
            backup(lived, other, force=True)
    finally:
        memory.close()
    backup(lived, other, force=True)


def test_a_damaged_file_and_another_program_s_are_not_copied(lived: Path, tmp_path: Path) -> None:
    with sqlite3.connect(lived) as conn:
        conn.execute("UPDATE tasks SET answer = 'other' WHERE id = 2")
    with pytest.raises(VerificationFailed, match="life.db does not agree"):
        backup(lived, tmp_path / "copy.db")
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as conn:
        conn.execute("CREATE TABLE t (x)")
    with pytest.raises(NotADatabase, match="another program"):
        backup(foreign, tmp_path / "copy.db")
    assert "copy.db" not in beside(lived) and not [name for name in beside(lived) if "part" in name]


def test_the_command_says_what_it_did(lived: Path, tmp_path: Path) -> None:
    goal = tmp_path / "copy.db"
    done = CliRunner().invoke(app, ["backup", str(lived), str(goal)])
    assert done.exit_code == 0 and "agrees with itself: 3 runs, 6 tasks" in done.output
    done = CliRunner().invoke(app, ["backup", str(lived), str(goal)])
    assert done.exit_code == 1 and "--force" in done.output
    done = CliRunner().invoke(app, ["backup", str(lived), str(goal), "--force", "--json"])
    told = json.loads(done.stdout)
    assert told["ok"] and told["size"] == goal.stat().st_size and told["from"] == str(lived)


def test_a_file_in_which_no_model_was_asked_yet_is_copied_too(tmp_path: Path) -> None:
    path = tmp_path / "young.db"

    async def answer(task: Task, context: str, tools: Any) -> str:
        return "nine"

    with CoDAgent("a", solver=answer, memory=path, updates=False) as agent:
        agent.solve_sync(Task(id="t"))
    done = CliRunner().invoke(app, ["backup", str(path), str(tmp_path / "copy.db")])
    assert done.exit_code == 0, done.output
    assert "agrees with itself: 1 run, 1 task, 1 context, 0 calls." in " ".join(done.output.split())
