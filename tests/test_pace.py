"""As many requests under way as the server takes: the pace by itself, and against a server that refuses what is too much."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from servers import Answer, Fault, ScriptedServer

from cod_agent.context import message
from cod_agent.errors import ModelOverloaded
from cod_agent.journal.episode import Episode
from cod_agent.memory import Memory, runs
from cod_agent.models.openai import OpenAIModel
from cod_agent.models.pace import Pace
from cod_agent.tasks import Task


async def test_the_limit_holds_and_turns_come_in_order() -> None:
    pace, order, most, now = Pace(3), list[int](), 0, 0

    async def ask(number: int) -> None:
        nonlocal most, now
        async with pace.turn():
            order.append(number)
            now += 1
            most = max(most, now)
            await asyncio.sleep(0.001)
            now -= 1

    await asyncio.gather(*(ask(number) for number in range(20)))
    assert most == 3 and order == list(range(20))


async def test_one_round_of_refusals_halves_the_number_once() -> None:
    pace = Pace(32)
    async with pace.turn() as one, pace.turn() as other:
        pace.refused(one)
        pace.refused(other)
    assert pace.now == 16
    async with pace.turn() as later:
        pace.refused(later)
        pace.refused(one)
    assert pace.now == 8
    for _ in range(10):
        async with pace.turn() as began:
            pace.refused(began)
    assert pace.now == 1


async def test_it_grows_by_one_after_a_round_of_answers_and_not_past_the_limit() -> None:
    pace = Pace(4)
    async with pace.turn() as began:
        pace.refused(began)
    grown = []
    for _ in range(9):
        pace.answered()
        grown.append(pace.now)
    assert grown == [2, 3, 3, 3, 4, 4, 4, 4, 4]


async def test_a_smaller_number_waits_until_enough_have_gone() -> None:
    pace, entered = Pace(4), list[str]()
    async with asyncio.timeout(5):
        async with pace.turn() as began, pace.turn(), pace.turn():
            pace.refused(began)

            async def late() -> None:
                async with pace.turn():
                    entered.append("late")

            waiting = asyncio.create_task(late())
            await asyncio.sleep(0.01)
            assert not entered
        await waiting
    assert entered == ["late"]


async def test_who_gives_up_waiting_takes_no_turn_with_it() -> None:
    pace = Pace(1)

    async def ask() -> str:
        async with pace.turn():
            return "asked"

    async with asyncio.timeout(5):
        async with pace.turn():
            gone, there = asyncio.create_task(ask()), asyncio.create_task(ask())
            await asyncio.sleep(0)
            gone.cancel()
        given = asyncio.create_task(ask())
        await asyncio.sleep(0)
        given.cancel()  # at the moment when its turn has come, or is about to
        assert await there == "asked" and await ask() == "asked"


class Narrow:
    """Takes four requests at a time and refuses what is more."""

    def __init__(self) -> None:
        self.lock, self.now, self.refusals = threading.Lock(), 0, 0

    def __call__(self, request: dict, n: int) -> Answer | Fault:
        with self.lock:
            if self.now == 4:
                self.refusals += 1
                return Fault(status=429, retry_after=0.02)
            self.now += 1
        time.sleep(0.08)  # long beside what a busy machine takes to ask again
        with self.lock:
            self.now -= 1
        return Answer(f"answer {request['messages'][-1]['content']}")


async def asked(path: Path, narrow: Narrow, calls: int) -> list[str]:
    """So many calls, all at once, in an episode on record."""
    memory = Memory.open(path, durable=False)

    def begin(conn: sqlite3.Connection) -> None:
        run = runs.open_run(conn, "a", "r", environment=None, pack=None, length=None, model="m", settings={})
        runs.begin_task(conn, run, 0, Task(id="t"))

    await memory.write(begin)
    with ScriptedServer(narrow) as server:
        model = OpenAIModel("m", base_url=server.url, concurrency=32, retries=1000)
        with Episode(memory, 1, 1):
            said = await asyncio.gather(
                *(model.complete([message("user", ("application", f"{number}"))]) for number in range(calls))
            )
        await model.aclose()
    stored = await memory.read(
        lambda conn: conn.execute("SELECT (SELECT count(*) FROM calls), (SELECT count(*) FROM attempts)").fetchone()
    )
    memory.close()
    assert stored == (calls, narrow.refusals)
    return [completion.text for completion in said]


async def test_a_narrow_server_gives_all_answers_and_refuses_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paced, unpaced = Narrow(), Narrow()
    expected = [f"answer {number}" for number in range(120)]
    assert await asked(tmp_path / "paced.db", paced, 120) == expected
    monkeypatch.setattr(Pace, "refused", lambda self, began: None)
    assert await asked(tmp_path / "unpaced.db", unpaced, 120) == expected
    assert 0 < paced.refusals < unpaced.refusals / 2


async def test_what_is_refused_for_good_still_ends_with_an_error() -> None:
    with ScriptedServer(lambda request, n: Fault(status=503, retry_after=0.0)) as server:
        model = OpenAIModel("m", base_url=server.url, retries=2)
        with pytest.raises(ModelOverloaded, match="asked 3 times"):
            await model.complete([message("user", ("application", "hello"))])
        await model.aclose()
    assert server.count == 3
