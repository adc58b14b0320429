"""Packs fanned out over a Ray cluster: each task of Ray lives a few packs with a run database of its own, which is then merged.

    with ray_cluster("auto") as cluster:            # or "local", or HOST:PORT
        found = asyncio.run(study(parts, memory, cluster=cluster))

The machines need this package, the model (an endpoint they reach, or its files at the same path) and nothing else: no shared disk. The
evaluation's file stays the one place that says what was lived. A chunk of packs takes along what the file has of it, and comes back
as a file, even if the model failed in the middle; a worker that died has its chunk lived elsewhere. What a chunk cannot live, because
it needs a pack of another one, is lived here at the end, and everything is read from the merged file: so the result is the same object
as without a cluster.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from cod_agent.errors import CodError, MissingExtra, UsageError
from cod_agent.evaluation.lanes import Lane, Life
from cod_agent.evaluation.lives import Watch, live_all
from cod_agent.evaluation.plan import Plan
from cod_agent.memory import Memory
from cod_agent.memory.merge import Named, merge

MOST_PACKS = 32
"""Of a chunk: what a worker that is lost, or a program that is killed, has to live again."""

_ENDPOINT = ("OPENAI_API_KEY", "OPENAI_BASE_URL")
"""Variables of this process's environment that a worker gets: its own machine need not have them."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a worker is sent."""

    plan: Plan
    settings: dict[str, dict[str, Any]]
    """Kept with the runs of each agent."""
    lives: frozenset[tuple[str, Life]]
    """Agent and life."""
    known: bytes
    """A run database with what was lived of these packs before; b"" for none."""
    api_key: str | None
    environment: dict[str, str]


@dataclass(frozen=True, slots=True)
class Returned:
    """What comes back."""

    file: bytes
    """The worker's run database; b"" where it was lost."""
    error: CodError | None
    """What kept it from living everything."""


class Cluster(Protocol):
    """Machines that live chunks of packs."""

    workers: int
    """Chunks lived at once."""

    async def live(self, work: Work) -> Returned:
        """Live a chunk somewhere.

        Raises:
            CodError: it was lost, again and again.
        """
        ...


async def fan_out(
    lanes: Sequence[Lane], memory: Memory, cluster: Cluster, watch: Watch | None = None, *, api_key: str | None = None
) -> float:
    """`live_all` on a cluster: rewards and counts are in the lanes afterwards. Returns the seconds it took.

    Args:
        lanes: of one plan.
        memory: where everything ends up; what it has already is not lived again.
        watch: is told of a chunk's outcomes when it has come back.
        api_key: of the model's endpoint; the workers get it in their memory.

    Raises:
        CodError: the first one of any chunk, when what is under way has come back; calling again goes on.
    """
    watch, started = watch or Watch(), time.monotonic()
    at_once = min(cluster.workers, lanes[0].plan.concurrency)
    waiting = deque(_chunks(lanes, memory, at_once))
    under_way: dict[asyncio.Task[Returned], _Chunk] = {}
    read: set[tuple[str, Life]] = set()
    trouble: CodError | None = None

    async def send() -> None:
        while waiting and trouble is None and len(under_way) < at_once:
            chunk = waiting.popleft()
            work = await asyncio.to_thread(chunk.work, memory, at_once, api_key)
            under_way[asyncio.create_task(cluster.live(work))] = chunk

    try:
        await send()
        while under_way:
            done, _ = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
            came = [(under_way.pop(one), _result(one)) for one in done]
            trouble = trouble or next((back.error for _, back in came if back.error is not None), None)
            await send()  # the workers go on while this process merges
            for chunk, back in came:
                await asyncio.to_thread(_take, memory, back.file)
                if back.error is None:
                    await live_all(lanes, memory, watch, chosen=chunk.has)
                    read |= chunk.lives
    finally:
        for one in under_way:
            one.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
    if trouble is not None:
        raise trouble
    await live_all(lanes, memory, watch, chosen=lambda lane, life: (lane.agent, life) not in read)
    return time.monotonic() - started


def _result(one: asyncio.Task[Returned]) -> Returned:
    try:
        return one.result()
    except CodError as lost:
        return Returned(b"", lost)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Packs next to each other, in all lanes."""

    lanes: Sequence[Lane]
    lives: frozenset[tuple[str, Life]]
    """Those to be lived by a worker: agent and life."""

    def has(self, lane: Lane, life: Life) -> bool:
        return (lane.agent, life) in self.lives

    def work(self, memory: Memory, workers: int, api_key: str | None) -> Work:
        """What to send, with what the file has of it now."""
        plan = self.lanes[0].plan
        own = {name: os.environ[name] for name in _ENDPOINT if name in os.environ}
        settings = {lane.agent: lane.settings for lane in self.lanes}
        # As many packs at once as without a cluster, in all.
        plan = replace(plan, concurrency=max(1, plan.concurrency // workers))
        return Work(plan, settings, self.lives, _part(memory, self._runs()), api_key, own)

    def _runs(self) -> set[Named]:
        """The runs that the lives are, and those that they need."""
        found = set[Named]()
        for lane in self.lanes:
            for agent, life in self.lives:
                if agent == lane.agent:
                    found.add((agent, lane.run(life)))
                    if (needed := lane.needed(life)) is not None and lane.main is not None:
                        found.add((lane.main.agent, lane.main.run(needed)))
        return found


def _chunks(lanes: Sequence[Lane], memory: Memory, workers: int) -> Iterator[_Chunk]:
    """What is not lived to its end yet, in pieces that a worker can live by itself."""
    plan, done = lanes[0].plan, _done(memory, lanes[0].plan)
    size = min(MOST_PACKS, max(1, plan.rows // (4 * workers)))
    for first in range(0, plan.rows, size):
        rows = range(first, min(plan.rows, first + size))
        lives = frozenset(
            (lane.agent, life)
            for lane in lanes
            for life in lane.lives()
            if life.row in rows and (lane.agent, lane.run(life)) not in done and _ready(lane, life, rows, done)
        )
        if lives:
            yield _Chunk(lanes, lives)


def _ready(lane: Lane, life: Life, rows: range, done: set[Named]) -> bool:
    """Whether what a life needs is lived before it, by the same worker or before all."""
    needed = lane.needed(life)
    if needed is None or lane.main is None or needed.row in rows:
        return True
    return (lane.main.agent, lane.main.run(needed)) in done


def _done(memory: Memory, plan: Plan) -> set[Named]:
    """The runs with every task of a pack at its end. (One that has more to come is gone on with here.)"""
    query = (
        "SELECT r.agent, r.name FROM runs r JOIN tasks t ON t.run_id = r.id GROUP BY r.id "
        "HAVING count(*) >= ? AND sum(t.state NOT IN ('updated', 'closed')) = 0"
    )
    return set(memory.read_sync(lambda conn: conn.execute(query, (plan.pack_size,)).fetchall()))


def _part(memory: Memory, names: set[Named]) -> bytes:
    """A run database of those of the runs that there are, b"" if there are none."""
    known = set(memory.read_sync(lambda conn: conn.execute("SELECT agent, name FROM runs").fetchall())) & names
    if not known:
        return b""
    with _file() as path:
        part = Memory.open(path, durable=False)
        try:
            merge(part, memory.path, only=known, verified=True)
        finally:
            part.close()
        return path.read_bytes()


def _take(memory: Memory, file: bytes) -> None:
    if not file:
        return
    with _file() as path:
        path.write_bytes(file)
        merge(memory, path)


@contextmanager
def _file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cod-") as folder:
        yield Path(folder) / "runs.db"


# ---- on a worker ----


def live_work(work: Work) -> Returned:
    """Live a chunk, in a file of its own. Ends with what it has when a model or anything else of ours fails."""
    os.environ.update(work.environment)
    error: CodError | None = None
    with _file() as path:
        if work.known:
            path.write_bytes(work.known)
        memory = Memory.open(path, durable=False)
        try:
            asyncio.run(_live(work, memory))
        except CodError as stopped:
            error = stopped
        finally:
            memory.close()
        return Returned(path.read_bytes(), error)


async def _live(work: Work, memory: Memory) -> None:
    from cod_agent.evaluation.study import lanes_for

    async with AsyncExitStack() as stack:
        _, (lanes,) = lanes_for([work.plan], stack, work.api_key)
        for lane in lanes:
            lane.settings = work.settings[lane.agent]
        await live_all(lanes, memory, chosen=lambda lane, life: (lane.agent, life) in work.lives)


# ---- Ray ----


@contextmanager
def ray_cluster(address: str) -> Iterator[Cluster]:
    """A Ray cluster, connected to until the end; a process that is connected already stays so.

    Args:
        address: `auto` for the one this machine belongs to, `local` for one of this machine's cores that ends with us, or HOST:PORT.

    Raises:
        MissingExtra: Ray is not installed.
        UsageError: no cluster answers there.
    """
    try:
        import ray
    except ImportError:
        raise MissingExtra("--ray", "train") from None
    ours = not ray.is_initialized()
    if ours:
        _knock(address)
        quiet: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **quiet)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise _nobody(address, error) from error
    try:
        yield _Ray(ray)
    finally:
        if ours:
            ray.shutdown()


def _knock(address: str) -> None:
    """Whether anything answers at HOST:PORT: Ray itself waits for minutes. Raises: UsageError."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise _nobody(address, error) from error


def _nobody(address: str, error: Exception) -> UsageError:
    first = str(error).partition("\n")[0]
    return UsageError(
        f"no Ray cluster answers at {address!r} ({first}): start one with `ray start --head`, or use --ray local"
    )


class _Ray:
    """The cluster of this process."""

    def __init__(self, ray: Any) -> None:
        self._ray, self._live = ray, ray.remote(max_retries=3)(live_work)
        self.workers = max(1, int(ray.cluster_resources().get("CPU", 1)))

    async def live(self, work: Work) -> Returned:
        asked = self._live.remote(work)
        try:
            back: Returned = await asyncio.wrap_future(asked.future())
        except asyncio.CancelledError:
            self._ray.cancel(asked, force=True)
            raise
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except self._ray.exceptions.RayError as error:
            first = str(error).partition("\n")[0]
            raise CodError(f"Ray lost a chunk of packs for good ({first}): the same command goes on with it") from error
        return back
