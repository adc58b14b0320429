"""An evaluation fanned out over workers: the same record and the same figures as without, whatever fails on the way."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cod_agent import Memory, Task
from cod_agent.environments.drawn import Place
from cod_agent.environments.frozen_lake import PLAYERS, FrozenLake
from cod_agent.errors import CodError, MissingExtra, ModelUnreachable, UsageError
from cod_agent.evaluation import Evaluation, Plan
from cod_agent.evaluation.cluster import Returned, Work, live_work, ray_cluster
from cod_agent.evaluation.lives import Watch
from cod_agent.evaluation.study import study
from cod_agent.memory.projection import projection
from cod_agent.memory.verify import verify

FAILS, KILLS = "STEADY_FAILS_AFTER", "STEADY_KILLS_ONCE"


class NoDice:
    """Every draw is the first of the equally good answers."""

    def random(self) -> float:
        return 0.0


class Steady(FrozenLake):
    """Frozen lakes whose players throw no dice: whoever lives a pack lives the same life.

    As the environment of the process says, its players fail after some calls, or the first process to live pack 3 is killed.
    """

    calls = 0

    def __init__(self, **how: Any) -> None:
        super().__init__("small", **how)
        self.players = {name: lambda dice, make=make: steady(make(NoDice())) for name, make in PLAYERS.items()}

    def place(self, task: Task) -> Place:
        task = task.model_copy(update={"data": {**task.data, "preset": "small"}})
        marker = Path(os.environ.get(KILLS, os.devnull))
        if task.data["pack"] == 3 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().place(task)


def steady(player: Callable[[Any], str]) -> Callable[[Any], str]:
    def play(messages: Any) -> str:
        Steady.calls += 1
        if Steady.calls > int(os.environ.get(FAILS, 1 << 30)):
            raise ModelUnreachable("the line is dead")
        return player(messages)

    return play


CONTROLS = ("no-context", "frozen", "foreign", "attempts", "ralph-full")
PLAN = Plan("test_cluster_eval:Steady", "scripted:perfect", packs=5, pack_size=3, controls=CONTROLS)


class Threads:
    """Two workers in this process.

    Args:
        loses: chunks that get lost, by their number.
    """

    workers = 2

    def __init__(self, *loses: int) -> None:
        self.loses, self.sent = loses, list[Work]()

    async def live(self, work: Work) -> Returned:
        self.sent.append(work)
        if len(self.sent) - 1 in self.loses:
            raise CodError("the worker is gone")
        sent = pickle.loads(pickle.dumps(work))  # noqa: S301 (our own)
        return await asyncio.to_thread(live_work, sent)


def lived(path: Path, cluster: Any = None, plan: Plan = PLAN, watch: Watch | None = None) -> Evaluation:
    memory = Memory.open(path, durable=False)
    try:
        return asyncio.run(study([plan], memory, watch, cluster=cluster)).evaluations[0]
    finally:
        memory.close()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, list[Any]]:
    """What is found without a cluster, and the record of it."""
    path = tmp_path_factory.mktemp("alone") / "runs.db"
    return lived(path), projection(path)


def test_workers_leave_the_same_record_and_the_same_figures(tmp_path: Path, alone: Any) -> None:
    cluster, seen = Threads(), Counter[str]()
    watch = Watch(outcome=lambda lane, row, outcome: seen.update([lane.name]))
    found = lived(tmp_path / "runs.db", cluster, watch=watch)
    assert projection(tmp_path / "runs.db") == alone[1] and verify(tmp_path / "runs.db").ok
    assert timeless(found) == timeless(alone[0])
    assert len(cluster.sent) == 5 and not any(work.known for work in cluster.sent)
    assert {work.plan.concurrency for work in cluster.sent} == {16}
    # Each outcome was told once; the context of the next pack is another worker's, so that is lived here.
    assert seen["with context"] == 15 and seen["foreign"] == 15 and seen["ralph-full"] == 45
    assert not any(agent.endswith("/foreign") for work in cluster.sent for agent, _ in work.lives)


def test_what_is_there_is_not_lived_again(tmp_path: Path, alone: Any) -> None:
    path = tmp_path / "runs.db"
    lived(path, plan=replace(PLAN, controls=()))
    cluster = Threads()
    lived(path, cluster)
    # The settings of the first runs name no controls: all else is as it would be.
    assert without_settings(projection(path)) == without_settings(alone[1])
    agents = {agent for work in cluster.sent for agent, _ in work.lives}
    assert agents == {f"agent/{name}" for name in CONTROLS}, "the main lane's lives were sent along, not lived"
    assert all(work.known for work in cluster.sent)
    again = Threads()
    lived(path, again)
    assert not again.sent


def test_a_chunk_that_is_lost_is_lived_by_the_next_attempt(tmp_path: Path, alone: Any) -> None:
    path, cluster = tmp_path / "runs.db", Threads(1)
    with pytest.raises(CodError, match="the worker is gone"):
        lived(path, cluster)
    assert projection(path) and verify(path).ok
    again = Threads()
    lived(path, again)
    came = [life for number, work in enumerate(cluster.sent) for life in work.lives if number != 1]
    assert not {*came} & {life for work in again.sent for life in work.lives}, "what had come back was sent again"
    assert projection(path) == alone[1]


def test_a_model_that_fails_leaves_what_was_lived_and_the_next_attempt_goes_on_there(
    tmp_path: Path, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runs.db"
    monkeypatch.setenv(FAILS, str(Steady.calls + 60))
    with pytest.raises(ModelUnreachable, match="the line is dead"):
        lived(path, Threads())
    record = projection(path)
    assert any(entry[0] == "episode" and "live" in entry for entry in record), "no episode was broken off"
    monkeypatch.delenv(FAILS)
    before, cluster = Steady.calls, Threads()
    lived(path, cluster)
    assert any(work.known for work in cluster.sent)
    assert projection(path) == alone[1]
    made, before = Steady.calls - before, Steady.calls
    lived(path)  # nothing is left: these are the calls of the floor and the ceiling alone
    assert made - (Steady.calls - before) == calls_in(alone[1]) - calls_in(record), "a call was made twice"


def test_bad_addresses_are_clear_errors_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    for address in ("127.0.0.1:1", "nowhere", "host:port"):
        with pytest.raises(UsageError, match="ray start --head"), ray_cluster(address):
            pass
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"--ray needs .*\[train\]"), ray_cluster("local"):
        pass


@pytest.mark.slow
def test_ray_lives_it_too_and_a_worker_that_dies_is_replaced(
    tmp_path: Path, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv(KILLS, str(tmp_path / "killed"))
    with ray_cluster("local") as cluster:
        monkeypatch.delenv(KILLS)  # this process is not to be killed
        found = lived(tmp_path / "runs.db", cluster)
    assert (tmp_path / "killed").exists()
    assert projection(tmp_path / "runs.db") == alone[1] and verify(tmp_path / "runs.db").ok
    assert timeless(found) == timeless(alone[0])


def timeless(found: Evaluation) -> dict[str, Any]:
    """Everything found but how long it took."""
    return {**found.json(), "seconds": 0, "measures": {arm.name: arm.runs for arm in found.arms}}


def without_settings(record: list[Any]) -> list[Any]:
    """Settings, and the commits that have their hash in the chain."""
    return [entry[:-1] if entry[0] == "run" else entry for entry in record if entry[0] != "commit"]


def calls_in(record: list[Any]) -> int:
    return sum(entry[0] == "call" for entry in record)
