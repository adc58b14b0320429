"""An anchor tells what nothing inside of a run database can: a cut tail, a run taken out, a file exchanged."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from every_row import TASKS, Exact, Two, every_row
from typer.testing import CliRunner

from cod_agent import CoDAgent
from cod_agent.cli import app
from cod_agent.errors import UsageError, VerificationFailed
from cod_agent.memory.anchor import Anchor
from cod_agent.memory.database import Memory
from cod_agent.memory.merge import merge
from cod_agent.memory.readonly import look
from cod_agent.memory.verify import verify


async def live(path: Path, tasks: int, run: str = "life") -> None:
    async with CoDAgent("a", model=Exact(), memory=path, environment=Two()) as agent:
        async for _ in agent.run(TASKS[:tasks], run=run):
            pass


def note(path: Path, anchor: Path) -> int:
    with look(path) as conn:
        return Anchor(anchor).note(conn)


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """The state of `newer` before its last two tasks."""
    asyncio.run(live(tmp_path / "older.db", 2))
    return tmp_path / "older.db"


@pytest.fixture
def newer(older: Path, tmp_path: Path) -> Path:
    path = tmp_path / "newer.db"
    shutil.copy(older, path)
    asyncio.run(live(path, 4))
    return path


def test_a_file_that_lives_on_holds_every_link_that_was_noted(older: Path, newer: Path, tmp_path: Path) -> None:
    anchor = tmp_path / "a.anchor"
    assert [note(older, anchor), note(older, anchor), note(newer, anchor)] == [1, 0, 1]
    asyncio.run(live(newer, 1, run="another"))
    assert note(newer, anchor) == 1
    report = verify(newer, anchor)
    assert report.ok, report.faults
    assert report.anchored == 3


def test_a_cut_tail_is_found_only_with_an_anchor(older: Path, newer: Path, tmp_path: Path) -> None:
    anchor = tmp_path / "a.anchor"
    note(newer, anchor)
    assert verify(older).ok
    report = verify(older, anchor)
    assert "of commits is the newest of run 'life' of agent 'a', its anchor knows number" in report.faults[0]
    with pytest.raises(VerificationFailed, match="older than its anchor"):
        note(older, anchor)


def test_a_file_that_lived_on_from_an_older_state_is_found(older: Path, newer: Path, tmp_path: Path) -> None:
    anchor = tmp_path / "a.anchor"
    note(newer, anchor)

    async def other() -> None:
        async with CoDAgent("a", model=Exact(), memory=older, environment=Two()) as agent:
            async for _ in agent.run([*TASKS[:2], TASKS[0], TASKS[0], TASKS[0]], run="life"):
                pass

    asyncio.run(other())
    assert verify(older).ok
    assert "has another chain than its anchor" in verify(older, anchor).faults[0]
    with pytest.raises(VerificationFailed, match="another chain"):
        note(older, anchor)


def test_a_run_that_was_taken_out_is_found(newer: Path, tmp_path: Path) -> None:
    anchor = tmp_path / "a.anchor"
    asyncio.run(live(newer, 1, run="gone"))
    note(newer, anchor)
    memory = Memory.open(tmp_path / "less.db")
    merge(memory, newer, only={("a", "life")})
    memory.close()
    report = verify(tmp_path / "less.db", anchor)
    assert len(report.faults) == 1
    assert report.faults[0].startswith("run 'gone' of agent 'a' is not there")
    assert report.anchored == 1


def test_what_is_pruned_or_forgotten_later_stays_anchored(tmp_path: Path) -> None:
    path, anchor = tmp_path / "all.db", tmp_path / "a.anchor"
    asyncio.run(every_row(path))
    with sqlite3.connect(path) as conn:
        runs = conn.execute("SELECT count(*) FROM runs").fetchone()[0]
    assert note(path, anchor) == runs == verify(path, anchor).anchored


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [lines[0].replace('"life"', '"lofe"'), *lines[1:]],
        lambda lines: lines[1:],
        lambda lines: [lines[1], lines[0]],
        lambda lines: [lines[0], "{}\n"],
    ],
)
def test_an_anchor_that_was_changed_itself_is_found(older: Path, newer: Path, tmp_path: Path, change: object) -> None:
    anchor = tmp_path / "a.anchor"
    note(older, anchor)
    note(newer, anchor)
    lines = anchor.read_text().splitlines(keepends=True)
    anchor.write_text("".join(change(lines)))  # type: ignore[operator]
    report = verify(newer, anchor)
    assert not report.ok and "is not the one written" in report.json()["faults"][0]
    with pytest.raises(VerificationFailed, match="agrees with itself, but its anchor proves nothing") as said:
        report.require()
    assert "backup" not in str(said.value)


def test_a_line_that_a_crash_cut_off_is_written_over(older: Path, newer: Path, tmp_path: Path) -> None:
    anchor = tmp_path / "a.anchor"
    note(older, anchor)
    with anchor.open("a") as file:
        file.write('{"digest": "12')
    assert verify(newer, anchor).ok
    assert note(newer, anchor) == 1
    assert [set(json.loads(line)) for line in anchor.read_text().splitlines()] == [{"digest", "links", "time"}] * 2
    assert verify(newer, anchor).anchored == 2


def test_processes_share_an_anchor(older: Path, newer: Path, tmp_path: Path) -> None:
    """Each reads what the others added before it adds its own."""
    one, other = Anchor(tmp_path / "a.anchor"), Anchor(tmp_path / "a.anchor")
    with look(older) as before, look(newer) as now:
        assert [one.note(before), other.note(now), one.note(now)] == [1, 1, 0]
    assert verify(newer, tmp_path / "a.anchor").anchored == 2


def test_an_anchor_that_is_not_there_or_empty_is_no_proof(older: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no anchor"):
        verify(older, tmp_path / "none")
    (tmp_path / "empty").touch()
    assert not verify(older, tmp_path / "empty").ok
    with pytest.raises(VerificationFailed, match="empty is empty: restore a copy of it"):
        verify(older, tmp_path / "empty").require()


@pytest.mark.parametrize("said", ["a list of things to buy", "one line\n", "{}\n", "[1]\nsecond\n"])
def test_a_file_that_is_no_anchor_is_left_as_it_is(older: Path, tmp_path: Path, said: str) -> None:
    other = tmp_path / "notes.txt"
    other.write_text(said)
    for compare in (lambda: note(older, other), lambda: verify(older, other)):
        with pytest.raises(UsageError, match="is no anchor, but some other file"):
            compare()
    assert other.read_text() == said


def test_an_anchor_has_a_place_of_its_own_and_makes_no_folder(older: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(older)
    for end in ("", "-wal", "-shm", "-journal", ".lock"):
        done = CliRunner().invoke(app, ["anchor", str(link), f"{older}{end}"])
        assert done.exit_code == 1 and "a part of it" in " ".join(done.output.split())
    for command in (["anchor", str(older)], ["run", "frozen-lake:tiny", "--db", str(older), "--anchor"]):
        done = CliRunner().invoke(app, [*command, str(tmp_path / "typo" / "a.anchor")])
        assert done.exit_code == 1 and "there is no folder" in done.output
    assert not (tmp_path / "typo").exists()


def test_the_commands_note_and_compare(tmp_path: Path) -> None:
    def cod(*words: str) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        return done.stdout

    db, anchor = str(tmp_path / "lake.db"), str(tmp_path / "lake.anchor")
    play = ("frozen-lake:tiny", "--model", "scripted:perfect", "--db", db)
    cod("run", *play, "--packs", "2", "--pack-size", "2", "--anchor", anchor)
    assert sum(len(json.loads(line)["links"]) for line in Path(anchor).read_text().splitlines()) == 4
    assert "knows all of it already" in cod("anchor", db, anchor)
    assert "It holds all that" in cod("verify", db, "--anchor", anchor)
    (tmp_path / "lake.db").unlink()
    cod("run", *play, "--packs", "1", "--pack-size", "2", "--seed", "5")
    done = CliRunner().invoke(app, ["verify", db, "--anchor", anchor, "--json"])
    assert done.exit_code == 1
    assert len(json.loads(done.stdout)["faults"]) == 2
