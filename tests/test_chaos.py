"""Endpoints as they are in the field: whatever they do, each answered call is on record once, as it was answered, and each attempt too.

`make chaos` has 10,000 calls, killed 20 times; the tests here have some hundred.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from chaos import FAULTS, Chaos, expected, honest
from chaos_lives import TURNS
from servers import ScriptedServer

from cod_agent.memory.content import rebuild_request
from cod_agent.memory.verify import verify

LIVES, TASKS, KILLS = (400, 5, 20) if os.environ.get("COD_CHAOS") else (12, 3, 2)


def lived(chaos: Chaos, database: Path, kills: int, dice: Random) -> None:
    """Start the lives, kill them at some moments, and start them again until they are done."""
    aim = LIVES * TASKS * (TURNS + 1)
    marks = sorted(dice.uniform(0.1, 0.9) * aim for _ in range(kills))
    while True:
        script = Path(__file__).parent / "chaos_lives.py"
        life = subprocess.Popen([sys.executable, script, chaos.url, database, str(LIVES), str(TASKS)])
        try:
            while life.poll() is None:
                if marks and chaos.count > marks[0]:
                    marks.pop(0)
                    life.send_signal(signal.SIGKILL)
                time.sleep(0.01)
        finally:
            life.kill()
            life.wait()
        if life.returncode == 0:
            return
        assert life.returncode == -signal.SIGKILL


def recorded(database: Path) -> tuple[dict[bytes, tuple[bytes, str]], Counter[bytes]]:
    """(request hash -> the request and what was answered, failed attempts by request hash)."""
    with sqlite3.connect(database) as conn:
        calls = conn.execute(
            "SELECT c.id, c.request, c.occurrence, json_extract(m.body, '$.content') FROM calls c"
            " JOIN messages m ON m.id = c.answer_id"
        ).fetchall()
        assert all(occurrence == 0 for _, _, occurrence, _ in calls) and len({key for _, key, _, _ in calls}) == len(
            calls
        )
        failed = conn.execute("SELECT request FROM attempts WHERE kind = 'call' AND state = 'failed'").fetchall()
        answers = {key: (rebuild_request(conn, call), said) for call, key, _, said in calls}
    return answers, Counter(key for (key,) in failed)


@pytest.mark.parametrize("kills", [KILLS] if os.environ.get("COD_CHAOS") else [0, KILLS])
def test_whatever_an_endpoint_does_no_answer_is_lost_and_none_recorded_twice(tmp_path: Path, kills: int) -> None:
    database, began = tmp_path / "chaos.db", time.monotonic()
    with ScriptedServer(honest) as server, Chaos(server.port, seed=kills) as chaos:
        lived(chaos, database, kills, Random(kills))
        reached, unread, done = Counter(chaos.reached), chaos.unread, chaos.done
    answers, failed = recorded(database)
    assert len(answers) == LIVES * TASKS * (TURNS + 1)
    for request, said in answers.values():
        assert said == expected(request)
    # The proxy's log is the witness: all that came to it is on record, but for what was under way at a kill.
    tried = Counter({request: 1 + failed[key] for key, (request, _) in answers.items()})
    assert failed.keys() <= answers.keys()
    missing = reached.total() + unread - tried.total()
    assert 0 <= missing <= kills * 32 * 2 if kills else missing == 0
    assert all(reached[request] >= 1 for request in tried) and not set(reached) - set(tried)
    if not kills:
        assert not reached - tried, "an attempt is not on record"
    report = verify(database)
    assert report.ok, report.faults[:3]
    if os.environ.get("COD_CHAOS"):
        assert set(done) - {"none"} == set(FAULTS)
        print(_told(len(answers), failed, missing, kills, done, time.monotonic() - began))


def _told(calls: int, failed: Counter[bytes], missing: int, kills: int, done: Counter[str], seconds: float) -> str:
    said: dict[str, Any] = {"calls": calls, "failed attempts": failed.total(), "under way at a kill": missing}
    faults = ", ".join(f"{name} {count}" for name, count in done.most_common())
    return f"\n{said}, {kills} kills, {seconds:.0f} s\n{faults}"
