"""`cod export`: what is written is what was lived, whatever way it came; what is gone is said; nothing but the export is touched."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from forgetful import PLANTED, house, lived, tasks
from lives import reply
from lives import tools as using_tools
from servers import ScriptedServer
from typer.testing import CliRunner
from writers import Writer

from cod_agent import CoDAgent, Completion, Memory, Outcome, Task, Tokens
from cod_agent.cli import app
from cod_agent.environments import make_world
from cod_agent.errors import ModelUnreachable, UnknownName, VerificationFailed
from cod_agent.journal import record_completion
from cod_agent.memory.content import unpack_floats
from cod_agent.memory.export import chat, episodes
from cod_agent.memory.merge import merge
from cod_agent.memory.projection import projection
from cod_agent.memory.prune import prune

GOLDEN = Path(__file__).with_name("golden") / "v1.db"
LAKE = make_world("frozen-lake:small", seed=3, form="compact")


class Player:
    """The world's player, with tokens of its own making; after so many calls its line is dead, or its process is."""

    name, form = "scripted:exact", "compact"

    def __init__(self, calls: int = 1000, kill: bool = False) -> None:
        self.left, self.kill = calls, kill

    async def complete(self, messages: Any, *, on_delta: Any = None) -> Completion:
        return await record_completion(self.name, messages, {"temperature": 1}, self.answer)

    async def answer(self, messages: Any) -> Completion:
        self.left -= 1
        if self.left < 0 and self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.left < 0:
            raise ModelUnreachable("the line is dead")
        prompt = [ord(at) for message in messages for at in message.content]
        said = LAKE.players["perfect"](Random(len(prompt)))(
            messages
        )  # a function of what it is asked, also after a crash
        return Completion(said, tokens=Tokens(prompt, [ord(at) for at in said], [-0.5] * len(said)), weights="w-1")


class Noted(Writer):
    """Whose calls are on record."""

    async def complete(self, messages: Any, *, on_delta: Any = None) -> Completion:
        return await record_completion(self.name, messages, {}, super().complete)


def live(path: Path, calls: int = 1000, *, kill: bool = False, agent: str = "lake") -> list[Outcome]:
    with CoDAgent(agent, model=Player(calls, kill), memory=path) as living:
        return list(living.run_sync(LAKE.pack(4)))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy: SQLite leaves two files beside one that is only read."""
    return Path(shutil.copy(GOLDEN, tmp_path / "old.db"))


def cod(*words: object, code: int = 0) -> Any:
    found = CliRunner().invoke(app, ["export", *map(str, words)])
    assert found.exit_code == code, found.output
    return found


def lines(text: str) -> list[dict[str, Any]]:
    """Parsed as strictly as JSON is meant."""

    def no(word: str) -> Any:
        raise AssertionError(f"{word} is no JSON")

    assert text.isascii()
    return [json.loads(line, parse_constant=no) for line in text.splitlines()]


def exported(*words: object) -> list[dict[str, Any]]:
    return lines(cod(*words).stdout)


def agree(path: Path, found: list[dict[str, Any]]) -> None:
    """An export with tokens says of tasks, episodes, contexts, calls and effects what the projection of the file says."""
    known: dict[str, list[Any]] = {}
    for kind, *rest in projection(path):
        known.setdefault(kind, []).append(rest)
    wheres = [(one["agent"], one["run"], one["position"], one["kind"]) for one in found]
    assert sorted(wheres) == sorted(tuple(row[:4]) for row in known["episode"])
    contexts = {tuple(row[:3]): row for row in known["context"]}
    of_tasks = {tuple(row[:3]): row for row in known["task"]}
    calls, effects = list(known.get("call", [])), list(known.get("effect", []))
    for where, one in zip(wheres, found, strict=True):
        assert contexts[(*where[:2], one["context"]["version"])][7] == one["context"]["text"]
        _, _, _, name, _, body, state, answer, reward, feedback, _ = of_tasks[where[:3]]
        assert json.loads(body) == one["task"] and name == one["task"]["id"]
        if one["kind"] == "solve":
            told = json.loads(feedback) if feedback else {"text": None}
            answer = None if one["state"] == "aborted" else answer
            assert (answer, reward, told["text"]) == (one["answer"], one["reward"], one["feedback"])
            assert ("lost" in one) == (told.get("reward") != told.get("reward"))
        elif one["update"]["version"] is not None:
            *_, position, text = contexts[(*where[:2], one["update"]["version"])][:8]
            assert (position, text) == (where[2], one["update"]["text"])
        else:
            assert (one["update"]["became"] == "kept") == (state == "updated")
        for call in one["calls"]:
            sent = {**call["parameters"], "messages": call["messages"]}
            row = next(
                row
                for row in calls
                if tuple(row[:4]) == where and json.loads(row[6]) == sent and json.loads(row[7][0]) == call["answer"]
            )
            calls.remove(row)
            *rest, exact, _ = row[8:]
            assert rest[1:4] == [call["finish_reason"], call["model"], call["weights"] or ""]
            assert (call["tokens"] and tuple(call["tokens"].values())) == exact
        for effect in one["effects"]:
            row = next(
                row
                for row in effects
                if (tuple(row[:4]), row[6], row[7]) == (where, effect["kind"], effect["name"] or "")
                and (None if row[8] is None else json.loads(row[8])) == effect["arguments"]
            )
            effects.remove(row)
            result, said = json.loads(row[9]), effect["result"]
            assert said == result if row[6] == "tool" else (said["text"], said["done"]) == (result[0], result[2])
    assert not calls and not effects, "everything is exported"


def test_a_life_is_exported_as_it_was_lived(tmp_path: Path) -> None:
    outcomes = live(tmp_path / "a.db")
    found = exported(tmp_path / "a.db", "--tokens")
    assert [(one["position"], one["kind"]) for one in found] == [
        (at, kind) for at in range(4) for kind in ("solve", "update")
    ][:-1]
    for outcome in outcomes:
        solve, *update = [one for one in found if one["position"] == outcome.position]
        feedback = outcome.feedback
        assert feedback and solve["task"] == outcome.task.model_dump()
        assert (solve["answer"], solve["reward"]) == (outcome.answer, outcome.reward)
        assert (solve["feedback"], solve["ending"]) == (feedback.text, feedback.ending)
        assert len(solve["calls"]) + sum(len(one["calls"]) for one in update) == outcome.calls
        for one in update:
            assert one["update"]["became"] == "written" == outcome.update
            assert (one["update"]["version"], one["update"]["text"]) == (outcome.version, outcome.context)
            assert one["update"]["return"] == outcomes[outcome.position + 1].reward
    agree(tmp_path / "a.db", found)
    call = found[0]["calls"][0]
    assert "".join(map(chr, call["tokens"]["sampled"])) == call["answer"]["content"]
    assert "tokens" not in exported(tmp_path / "a.db")[0]["calls"][0]


def test_a_life_that_was_killed_is_exported_as_far_as_it_came_and_whole_when_it_was_resumed(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.db", tmp_path / "killed.db"
    live(whole)
    code = (
        "import sys; from pathlib import Path; from test_cli_export import live; live(Path(sys.argv[1]), 6, kill=True)"
    )
    folders = os.pathsep.join((str(Path(__file__).parent), str(Path(__file__).parents[1])))
    died = subprocess.run([sys.executable, "-c", code, str(path)], env={**os.environ, "PYTHONPATH": folders})
    assert died.returncode == -signal.SIGKILL
    before = exported(path, "--tokens")
    assert before[-1]["state"] == "live" and sum(len(one["calls"]) for one in before) == 6
    live(path)
    assert exported(path, "--tokens") == exported(whole, "--tokens"), "there are no times and no row ids in it"
    agree(path, exported(path, "--tokens"))


async def test_feedback_that_comes_late_or_never_is_told_from_what_was_lost(memory: Memory) -> None:
    async with CoDAgent("a", model=Noted("one", "two"), memory=memory) as agent:
        solved = [await agent.solve(Task(id=f"t{at}", prompt="?", data={"odd": float("inf")})) for at in range(3)]
        first = exported(memory.path)
        await agent.feedback(solved[0], 0.5, "fine \u202e\ud83d")
        await agent.feedback(solved[2], float("nan"))
    assert [(one["reward"], one["feedback"], "lost" in one) for one in first] == [(None, None, False)] * 3
    assert first[0]["task"]["data"] == {"odd": None}, "JSON has no infinities"
    found = exported(memory.path)
    assert [(one["position"], one["kind"]) for one in found[:4]] == [
        (0, "solve"),
        (1, "solve"),
        (2, "solve"),
        (0, "update"),
    ]
    assert [(one["reward"], one.get("lost")) for one in found[:3]] == [(0.5, None), (None, None), (None, True)]
    assert found[3]["update"]["became"] == "written" and found[3]["update"]["return"] is None


async def test_a_held_update_says_so_and_is_learnt_from_once_it_is_adopted(memory: Memory) -> None:
    async with CoDAgent("a", model=Noted("one", "two", "three"), memory=memory, gate="review") as agent:
        for at in range(2):
            await agent.feedback(await agent.solve(Task(id=f"t{at}", prompt="?")), 1.0)
        held = [one["update"] for one in episodes(memory.path) if one["kind"] == "update"]
        skipped = Counter[str]()
        assert [one["meta"]["kind"] for one in chat(memory.path, skipped)] == ["solve"] * 2
        assert skipped == {"the update was held": 2}
        await agent.review().accept(1)
        await agent.feedback(await agent.solve(Task(id="t2", prompt="?")), 0.25)
    assert [(one["became"], one["version"], one["text"], one["decided"]) for one in held] == [
        ("held", 1, "one", None),
        ("held", 2, "two", None),
    ]
    assert held[0]["why"] == "review: every update waits for a decision"
    spoken = [one for one in chat(memory.path, Counter()) if one["meta"]["kind"] == "update"]
    assert [(one["meta"]["position"], one["reward"]) for one in spoken] == [(0, 0.25)]


def test_an_older_file_is_exported_as_it_is_and_not_migrated(old: Path) -> None:
    found = exported(old, "--tokens")
    agree(old, found)
    assert old.read_bytes() == GOLDEN.read_bytes()
    assert {one["state"] for one in found} == {"live", "done", "refused", "aborted"}
    assert {one["update"]["became"] for one in found if one["kind"] == "update"} >= {"written", "kept"}
    aborted = [one for one in found if one["state"] == "aborted"]
    assert all(one["reason"] and one["lost"] and one["reward"] is None for one in aborted)
    tools = [effect for one in found for effect in one["effects"] if effect["kind"] == "tool"]
    assert {tuple(effect["result"]) for effect in tools} == {("value",), ("error",)}


def test_what_was_pruned_is_null_and_says_so(old: Path) -> None:
    before = exported(old)
    memory = Memory.open(old)
    assert prune(memory, 1e12, even_untrained=True).tasks
    memory.close()
    found, counts = exported(old, "--tokens"), Counter[str]()
    for was, one in zip(before, found, strict=True):
        kept = {key: value for key, value in one.items() if key not in ("calls", "effects")}
        assert kept == {key: was[key] for key in kept}, "tasks, answers, rewards and contexts stay"
        for call, then in zip(one["calls"], was["calls"], strict=True):
            counts["call"] += "gone" in call
            if "gone" in call:
                assert (call["messages"], call["parameters"], call["answer"], call["tokens"]) == (None,) * 4
                assert (call["gone"], call["finish_reason"]) == ("pruned", then["finish_reason"])
        for effect in one["effects"]:
            counts["effect"] += "gone" in effect
            assert effect.get("gone", "pruned") == "pruned" and ("gone" in effect) == (effect["result"] is None)
    assert counts["call"] > 20 and counts["effect"] > 20
    done = cod(old, "--format", "chat")
    assert len(lines(done.stdout)) == sum(len(one["calls"]) for one in found) - counts["call"] > 0
    assert "calls skipped: the text is gone (pruned)." in done.stderr


async def test_what_was_forgotten_is_null_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with house(path) as agent:
        assert PLANTED in await lived(agent, tasks(3, {1: "feedback"}))
        await agent.forget("room1", reason="it was an attack")
    text = cod(path, "--tokens").stdout
    found = [one for one in lines(text) if one["run"] == "life"]
    assert PLANTED not in text
    assert "(forgotten)" not in json.dumps(found)
    solve, update = [one for one in found if one["position"] == 1]
    assert (solve["task"]["prompt"], solve["answer"], solve["feedback"], solve["gone"]) == (
        None,
        None,
        None,
        "forgotten",
    )
    assert solve["task"]["gone"] == solve["calls"][0]["gone"] == solve["effects"][0]["gone"] == "forgotten"
    assert (update["update"]["text"], update["update"]["gone"]) == (None, "forgotten") and update["update"][
        "version"
    ] == 2
    after = next(one for one in found if (one["position"], one["kind"]) == (2, "solve"))
    assert (after["context"]["text"], after["context"]["gone"], after["answer"]) == (None, "forgotten", None)
    assert solve["reward"] == 0.5 and "gone" not in found[0]
    assert all(one["meta"]["run"] == "life" for one in lines(cod(path, "--format", "chat").stdout)), (
        "not what was derived again"
    )


def test_a_merged_file_is_exported_agent_by_agent(tmp_path: Path, memory: Memory, old: Path) -> None:
    for name in ("ada", "bob"):
        live(tmp_path / f"{name}.db", agent=name)
        merge(memory, tmp_path / f"{name}.db")
    merge(memory, old)
    for name in ("ada", "bob"):
        assert exported(memory.path, "--agent", name) == exported(tmp_path / f"{name}.db")
    branch = exported(memory.path, "--run", "branch")
    assert {(one["agent"], one["run"]) for one in branch} == {("lake", "branch")}
    agree(Path(memory.path), exported(memory.path, "--tokens"))
    for wrong in (("--agent", "eve"), ("--run", "trunk"), ("--agent", "bob", "--run", "branch")):
        assert "no agent called" in (said := cod(memory.path, *wrong, code=1).stderr) or "no run called" in said
    with pytest.raises(UnknownName):
        next(episodes(memory.path, agent="eve"))


async def test_chat_is_what_fine_tuning_tools_read(memory: Memory) -> None:
    async with CoDAgent("a", model=Noted("one", "two"), memory=memory) as agent:
        for at, reward in enumerate((1.0, 0.25, None)):
            outcome = await agent.solve(Task(id=f"t{at}", prompt="?"))
            if reward is not None:
                await agent.feedback(outcome, reward)
    calls = {(one["position"], one["kind"]): one["calls"][0] for one in exported(memory.path)}
    done = cod(memory.path, "--format", "chat", "--min-reward", 0.5)
    found = lines(done.stdout)
    assert [(one["meta"]["position"], one["meta"]["kind"], one["reward"]) for one in found] == [
        (0, "solve", 1.0),
        (0, "update", 0.25),
        (1, "update", None),
    ]
    for one in found:
        call = calls[one["meta"]["position"], one["meta"]["kind"]]
        assert one["messages"] == [*call["messages"], call["answer"]]
        assert [said["role"] for said in one["messages"]] == ["system", "user", "assistant"]
    assert found[0]["messages"][-1] == {"role": "assistant", "content": "fine"}
    assert done.stderr == "1 call skipped: no reward is known.\n1 call skipped: the reward is below 0.5.\n"
    assert len(lines(cod(memory.path, "--format", "chat").stdout)) == len(calls) == 5


def test_tools_that_were_offered_and_called_are_part_of_a_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIVES_LOG", str(tmp_path / "ran.log"))
    with ScriptedServer(reply) as server:
        using_tools(server.url, str(tmp_path / "a.db"))
    found = exported(tmp_path / "a.db", "--tokens")
    agree(tmp_path / "a.db", found)
    assert Counter(effect["name"] for one in found for effect in one["effects"]) >= Counter(count=3, price=3, order=3)
    spoken = [one for one in chat(tmp_path / "a.db", Counter()) if one["meta"]["kind"] == "solve"]
    for one in spoken:
        assert {"count", "price", "order"} <= {offered["function"]["name"] for offered in one["tools"]}
        called = [call["id"] for said in one["messages"][:-1] for call in said.get("tool_calls", ())]
        assert called == [said["tool_call_id"] for said in one["messages"] if said["role"] == "tool"]
    assert [call["function"]["name"] for call in spoken[0]["messages"][-1]["tool_calls"]] == ["count", "price"]


def test_a_file_is_written_whole_or_stays_what_it_was(tmp_path: Path) -> None:
    path, out = tmp_path / "a.db", tmp_path / "sub" / "a.jsonl"
    live(path)
    path.chmod(0o640)
    told = json.loads(cod(path, "--out", out, "--json").stdout)
    assert told["lines"] == 7 and lines(out.read_text()) == exported(path)
    assert out.stat().st_mode & 0o777 == 0o640
    assert cod(path, "--out", out, "--format", "chat").stdout.endswith(f"conversations written to {out}.\n")
    before = out.read_bytes()
    with sqlite3.connect(path) as conn:
        conn.execute("UPDATE tasks SET feedback = '{' WHERE position = 2")
    assert "is malformed" in cod(path, "--out", out, code=1).stderr
    with pytest.raises(VerificationFailed, match="cod verify"):
        list(episodes(path))
    assert out.read_bytes() == before and [one.name for one in out.parent.iterdir()] == ["a.jsonl"]
    assert "cannot be written" in cod(path, "--out", out / "below", code=1).stderr
    assert "there is no file" in cod(tmp_path / "none.db", "--out", tmp_path / "new" / "a", code=1).stderr
    assert not (tmp_path / "new").exists()


def test_a_disk_that_is_full_is_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    live(tmp_path / "a.db")
    lengthen(tmp_path / "a.db", 20)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        said = cod(tmp_path / "a.db", "--out", tmp_path / "a.jsonl", code=1).stderr
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "a.jsonl cannot be written" in said and "make room" in said
    assert not list(tmp_path.glob("*jsonl*"))


async def test_one_state_is_exported_while_the_life_goes_on(memory: Memory) -> None:
    async with CoDAgent("a", model=Noted(), memory=memory) as agent:
        for at in range(2):
            await agent.solve(Task(id=f"t{at}", prompt="?"))
        reading = episodes(memory.path)
        first = next(reading)
        await agent.solve(Task(id="t2", prompt="?"))
        assert [one["position"] for one in (first, *reading)] == [0, 1]
    assert len(exported(memory.path)) == 3


async def test_a_request_that_is_stored_whole_is_read_where_it_is_a_conversation(memory: Memory) -> None:
    async with CoDAgent("a", model=Noted(), memory=memory) as agent:
        await agent.solve(Task(id="t", prompt="?"))
    (before,) = exported(memory.path)
    for style, sent, readable in (
        ("raw", '{"messages": [{"role": "user", "content": "hi"}], "n": 1}', [{"role": "user", "content": "hi"}]),
        ("raw", '{"prompt": "hi", "messages": "hi"}', None),
        ("raw", "hi", None),
        ("bytes", '{"messages": [{"role": "user", "content": "h\u00e9"}]}', None),
    ):
        with sqlite3.connect(memory.path) as conn:
            conn.execute("UPDATE calls SET style = ?, prompt_id = NULL", (style,))
            conn.execute("UPDATE messages SET parent_id = NULL WHERE id = (SELECT answer_id FROM calls)")
            conn.execute("UPDATE heads SET body = ?", (sent,))
        (one,) = exported(memory.path)
        assert one["calls"][0]["messages"] == readable and one["calls"][0]["answer"] == before["calls"][0]["answer"]
        done = cod(memory.path, "--format", "chat")
        assert bool(done.stdout) == bool(readable) != ("no conversation" in done.stderr)


def test_no_database_is_written_over(tmp_path: Path) -> None:
    path = Path(shutil.copy(GOLDEN, tmp_path / "a.db"))
    other = Path(shutil.copy(GOLDEN, tmp_path / "b.db"))
    (tmp_path / "link").symlink_to(path)
    os.link(path, tmp_path / "same")
    for goal in (path, tmp_path / "a.db-wal", tmp_path / "link", tmp_path / "same", other, tmp_path, Path("/dev/null")):
        assert "name" in cod(path, "--out", goal, code=1).stderr
    assert path.read_bytes() == other.read_bytes() == GOLDEN.read_bytes()
    assert Path("/dev/null").is_char_device() and not (tmp_path / "a.db-wal").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--format", "csv"), "no format called"),
        (("--format", "chat", "--tokens"), "--format episodes"),
        (("--min-reward", 1), "--format chat"),
        (("--json",), "--out"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(words: tuple[object, ...], said: str) -> None:
    found = cod(GOLDEN, *words, code=1)
    assert said in found.stderr and not found.stdout


def test_a_reader_that_goes_is_a_sentence(old: Path) -> None:
    command = [sys.executable, "-m", "cod_agent.cli", "export", str(old)]
    options: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True, "cwd": Path(__file__).parents[1]}
    with subprocess.Popen(command, stdout=subprocess.PIPE, **options) as gone:
        assert gone.stdout and gone.stderr
        gone.stdout.close()
        assert gone.stderr.read().splitlines() == [
            "Error: the export is not whole, standard output takes no more: whoever read it has gone"
        ]
    assert gone.returncode == 1


def test_a_long_life_takes_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    live(tmp_path / "long.db")

    def peak() -> tuple[int, int]:
        tracemalloc.start()
        count = sum(1 for _ in episodes(tmp_path / "long.db", tokens=True))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return count, size

    lengthen(tmp_path / "long.db", 15)
    short = peak()
    lengthen(tmp_path / "long.db", 5)
    long = peak()
    assert long[0] == 5 * short[0] == 525
    assert long[1] < 1.25 * short[1]


def lengthen(path: Path, times: int) -> None:
    """The tasks and episodes of a file again and again, behind one another."""
    with sqlite3.connect(path) as conn:
        step = {
            table: conn.execute(f"SELECT max(id) + 1 FROM {table}").fetchone()[0]
            for table in ("tasks", "episodes", "calls")
        }
        moved = {"position": conn.execute("SELECT max(position) + 1 FROM tasks").fetchone()[0]}
        moved |= {"episode_id": step["episodes"], "prompt_base_id": step["calls"]}
        for table, ids in step.items():
            names = [row[1] for row in conn.execute(f"PRAGMA table_info({table})")]
            by = {**moved, "id": ids}
            values = ", ".join(f"{name} + {by[name]} * value" if name in by else name for name in names)
            numbers = (
                f"WITH RECURSIVE n (value) AS (SELECT 1 UNION ALL SELECT value + 1 FROM n WHERE value < {times - 1})"
            )
            conn.execute(f"INSERT INTO {table} ({', '.join(names)}) {numbers} SELECT {values} FROM {table}, n")


def test_log_probabilities_are_the_ones_that_were_recorded(old: Path) -> None:
    found = {
        tuple(call["tokens"]["logprobs"])
        for one in episodes(old, agent="lake", tokens=True)
        for call in one["calls"]
        if call["tokens"]
    }
    with sqlite3.connect(old) as conn:
        query = (
            "SELECT c.logprobs FROM calls c JOIN episodes e ON e.id = c.episode_id JOIN runs r ON r.id = e.run_id "
            "WHERE r.agent = 'lake' AND c.logprobs IS NOT NULL"
        )
        assert found == {tuple(unpack_floats(row[0])) for row in conn.execute(query)} and found
