"""What is promoted is what serves: model servers follow the registry, blue beside green, and a bad green never stays.

    wanted ──> start green ──> compare on its own port ──> switch the front ──> compare through the alias ──> drain blue ──> stop it
                    │                    │                                              │
                    └────────────────────┴── the front goes (or stays) with blue, <─────┘
                                             and the promotion is taken back: rejected, with the reason

A green is compared with the checkpoint's own log-probabilities (`cod_train.probe`), because a server that answers is not yet one
that has loaded the right weights. Adapters are loaded into their running base; the way is the same. A server that dies is started again.
"""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cod_agent.errors import CodError, UsageError
from cod_train.checkpoint_files import contents
from cod_train.checkpoints import Checkpoint, Registry
from cod_train.probe import FILE, TOLERANCE, TOLERANCE_16BIT, Probe, compare_served, make_probe
from cod_train.serving.engine import Engine
from cod_train.serving.events import Events
from cod_train.serving.front import Front
from cod_train.serving.server import ModelServer, ServerFailed

LOOK = 0.2
"""Seconds between two looks at the servers."""
POLL = 1.0
"""Seconds between two looks at the registry."""
RESTARTS = 5
"""Deaths in a row after which a server is given up."""
STEADY = 60.0
"""Seconds a server has to live for its death to begin a new row."""
GRACE, HURRY = 20.0, 2.0
"""Seconds a server gets to end by itself, and where somebody is impatient."""
LONGEST_PAUSE = 30.0
"""Seconds before a server that keeps dying is started again."""
LONGEST_WAIT = 30
"""Seconds that a client is asked to wait at most before it asks again."""


@dataclass(slots=True)
class _Held:
    """A checkpoint and the server that has it; adapters share one."""

    checkpoint: Checkpoint
    server: ModelServer
    since: float = field(default_factory=time.monotonic)

    @property
    def weights(self) -> str:
        return self.checkpoint.weights


class Serving:
    """Serves behind a front that has been started, and closes that at the end.

    Args:
        source: a registry, whose promoted checkpoint is followed, or one checkpoint.
        engine: what serves.
        log_folder: for the servers' output.
        ready_timeout: seconds until a server has to answer.
        drain: seconds that answers under way get when their server is to end.
    """

    def __init__(
        self,
        source: Registry | Checkpoint,
        engine: Engine,
        front: Front,
        events: Events,
        *,
        log_folder: Path,
        ready_timeout: float = 300,
        drain: float = 600,
    ) -> None:
        self.ready = asyncio.Event()
        """Set when something serves for the first time."""
        self._source, self._engine, self._front, self._tell = source, engine, front, events
        self._log_folder, self._ready_timeout, self._drain = log_folder, ready_timeout, drain
        self._held: _Held | None = None
        self._last: Checkpoint | None = None
        """What served last and was right: what comes back after a death, and stays where a green fails."""
        self._coming: Checkpoint | None = None
        self._bringing: asyncio.Task[None] | None = None
        self._retiring: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[Checkpoint | None] | None = None
        self._servers: list[ModelServer] = []
        self._refused: dict[str, str] = {}
        """Weights that did not come to serve, and why."""
        self._deaths, self._restarts, self._took = 0, 0, 1.0
        self._wanted_now: Checkpoint | None = None
        self._looked = -math.inf
        self._asked, self._hurried = asyncio.Event(), asyncio.Event()
        front.beside = self.status

    @property
    def current(self) -> Checkpoint | None:
        """What serves."""
        return self._held.checkpoint if self._held is not None else None

    def stop(self) -> None:
        """End: take no new requests, let those under way finish. Asked twice: at once."""
        (self._hurried if self._asked.is_set() else self._asked).set()

    def status(self) -> dict[str, Any]:
        """What stands behind the front."""
        return {
            "checkpoint": self._held and self._held.checkpoint.name,
            "engine": self._engine.kind,
            "coming": self._coming and self._coming.weights,
            "draining": self._retiring is not None,
            "restarts": self._restarts,
        }

    async def run(self) -> None:
        """Serve until `stop`. No server is left, however this ends.

        Raises:
            CodError: the first server did not come up or is not right, or one died too often in a row.
        """
        try:
            while not self._asked.is_set():
                await self._look()
                await self._rest()
        finally:
            await self._end()

    # ---- looking ----

    async def _look(self) -> None:
        """See what has changed, and begin what has to be done."""
        if self._bringing is not None and self._bringing.done():
            done, self._bringing, self._coming = self._bringing, None, None
            done.result()
        if self._retiring is not None and self._retiring.done():
            done, self._retiring = self._retiring, None
            done.result()
        on_trial = self._coming is not None and self._held is not None and self._held.weights == self._coming.weights
        if self._held is not None and not on_trial and self._held.server.ended is not None:
            self._died(self._held)
        wanted = await self._wanted()
        if self._coming is not None:
            taken_back = self._last is not None and wanted.weights == self._last.weights != self._coming.weights
            if taken_back:
                await self._abandon("its promotion was taken back")
        elif self._held is None or (self._retiring is None and self._held.weights != wanted.weights):
            self._coming = wanted
            self._bringing = asyncio.create_task(self._bring(wanted, self._held))

    async def _rest(self) -> None:
        """Until there may be something to see."""
        asked = asyncio.create_task(self._asked.wait())
        busy = [task for task in (self._bringing, self._retiring) if task is not None]
        await asyncio.wait({asked, *busy}, timeout=LOOK, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()

    async def _wanted(self) -> Checkpoint:
        """What should serve.

        Raises:
            CodError: at the beginning, the registry cannot be read or nothing is promoted; later, what serves goes on serving.
        """
        if isinstance(self._source, Checkpoint):
            return self._source
        if self._reading is None and (self._wanted_now is None or time.monotonic() - self._looked >= POLL):
            self._reading = asyncio.create_task(self._promoted(self._source))
        if self._reading is not None:
            # A locked file takes its time; servers are looked after meanwhile.
            await asyncio.wait({self._reading}, timeout=None if self._last is None else LOOK)
        if self._reading is not None and self._reading.done():
            done, self._reading, self._looked = self._reading, None, time.monotonic()
            try:
                self._wanted_now = done.result()
            except CodError as error:
                if self._last is None:
                    raise
                self._trouble(f"the registry: {error}")
        wanted = self._wanted_now
        if wanted is None or wanted.weights in self._refused:
            wanted = self._last
        if wanted is None:
            raise UsageError("there is nothing to serve")
        return wanted

    async def _promoted(self, registry: Registry) -> Checkpoint | None:
        """What is promoted; what was refused here is taken back first.

        Here and not where it is refused: the registry may be locked then, or a later promotion may be rolled back to it.

        Raises:
            CodError: the registry cannot be read or told, or nothing is promoted and nothing served yet.
        """
        found = await asyncio.to_thread(registry.promoted)
        if found is None and self._last is None:
            raise UsageError(
                f"nothing is promoted in {registry.path}: `cod promote NAME`, or name a checkpoint to serve"
            )
        if found is None or found.weights not in self._refused:
            return found
        name, why = found.name, f"not served: {self._refused[found.weights]}"
        try:
            return await asyncio.to_thread(lambda: registry.rollback(why, to="rejected", only=name))
        except CodError as error:
            raise CodError(f"it could not be told that {name} is rejected: {error}") from None

    def _trouble(self, why: str) -> None:
        if why != self._front.trouble:  # once, not at every look
            self._front.trouble = why
            self._tell("trouble", why=why)

    def _died(self, held: _Held) -> None:
        """Raises: ServerFailed, when it was once too often."""
        self._held = None
        self._front.remove(held.weights)
        # An agent asks five times: twice the time that starting took should do.
        self._front.retry_after = max(1, min(LONGEST_WAIT, math.ceil(self._took / 2)))
        self._forget(held.server)
        self._front.trouble = f"{held.weights} died with exit code {held.server.ended}"
        self._tell("died", weights=held.weights, code=held.server.ended, log=str(held.server.log))
        if time.monotonic() - held.since > STEADY:
            self._deaths = 0
        self._count_death(f"its log is {held.server.log}")

    def _count_death(self, hint: str) -> None:
        self._deaths += 1
        if self._deaths > RESTARTS:
            raise ServerFailed(f"the model server died {self._deaths} times in a row; {hint}")

    # ---- bringing something to serve ----

    async def _bring(self, target: Checkpoint, old: _Held | None) -> None:
        """Have `target` serve in place of `old`. It fails without harm, once something has served.

        Raises:
            CodError: nothing ever served, or what died does not come back.
        """
        again = self._last is not None and self._last.weights == target.weights
        if again and self._deaths > 1:
            await asyncio.sleep(min(LONGEST_PAUSE, 2.0 ** (self._deaths - 2)))
        began, new = time.monotonic(), None
        self._tell("starting", weights=target.weights, engine=self._engine.kind)
        try:
            probe = await self._checked(target)
            new = await self._started(target, old)
            self._tell("ready", weights=target.weights, seconds=time.monotonic() - began, at=new.server.base_url)
            await self._compare(probe, new.server.base_url, target.weights, new.server.key)
            self._front.add(target.weights, new.server.base_url, new.server.key)
            self._front.switch(target.weights)
            self._held = new
            self._tell(
                "restarted" if again else "switched", weights=target.weights, before=old.weights if old else None
            )
            await self._compare(probe, self._front.local_url, self._front.alias)
        except BaseException as error:
            await self._undo(new, old)
            if not isinstance(error, Exception) or self._last is None:
                raise
            # Whatever a bad candidate sets off, a library's own errors included: what serves goes on serving.
            kind = "" if isinstance(error, CodError) else f"{type(error).__name__}: "
            return self._failed(target, f"{kind}{error}", again)
        self._took = time.monotonic() - began
        self._front.retry_after = 1
        self._restarts += again
        self._last = target
        self.ready.set()
        if old is not None:
            self._retiring = asyncio.create_task(self._retire(old, new))
        return None

    async def _checked(self, target: Checkpoint) -> Probe:
        """The probe of a checkpoint whose files are those that its name says.

        Raises:
            UsageError: they are not.
        """
        if (await asyncio.to_thread(contents, target.folder)).digest != target.digest:
            raise UsageError(f"the files in {target.folder} have changed: they are no longer {target.weights}")
        if (target.folder / FILE).is_file():
            probe = Probe.load(target.folder)
            if probe.digest in ("", target.digest):
                return probe
        return await asyncio.to_thread(lambda: make_probe(target.folder, target.base, digest=target.digest))

    async def _started(self, target: Checkpoint, old: _Held | None) -> _Held:
        """Raises: CodError."""
        if old is not None and old.server.ended is None:
            if target.weights in old.server.serves:
                return _Held(target, old.server)
            if self._engine.lora and target.kind == "adapter" and target.base == _base(old.checkpoint):
                await old.server.load_adapter(target)
                return _Held(target, old.server)
        server = await ModelServer.start(target, self._engine, self._log_folder, ready_timeout=self._ready_timeout)
        self._servers.append(server)
        return _Held(target, server)

    async def _compare(self, probe: Probe, base_url: str, model: str, key: str = "") -> None:
        """Raises: CodError, when what serves is not what the probe was made of."""
        allowed = await asyncio.to_thread(tolerance, self._engine)
        found = await compare_served(probe, base_url, model, tolerance=allowed, key=key)
        figures = {"largest": found.largest, "mean": found.mean} if found.tokens else {}
        self._tell("compared", weights=model, tokens=found.tokens, tolerance=allowed, **figures, why=found.trouble)
        if found.trouble:
            raise CodError(f"what is served is not the checkpoint: {found.trouble}")

    async def _undo(self, new: _Held | None, old: _Held | None) -> None:
        """Back to `old`, and nothing of `new` is left."""
        if new is None:
            return
        if self._held is new:
            self._held = None
            self._front.remove(new.weights)
            if old is not None and old.server.ended is None:
                self._front.switch(old.weights)
                self._held = old
        if old is not None and new.server is old.server:
            await self._unload(new)
        else:
            await self._stop(new.server)

    def _failed(self, target: Checkpoint, why: str, again: bool) -> None:
        """A target did not come to serve. Raises: ServerFailed: it is what should come back, and has been tried often enough."""
        self._front.trouble = f"{target.weights}: {why}"
        if again:
            self._tell("trouble", weights=target.weights, why=why)
            self._count_death(why)
            return
        self._refused[target.weights] = why
        self._tell("rejected", weights=target.weights, why=why)
        self._looked = -math.inf

    async def _abandon(self, why: str) -> None:
        coming, bringing, self._coming, self._bringing = self._coming, self._bringing, None, None
        await _cancelled(bringing)
        self._tell("abandoned", weights=coming.weights if coming else "", why=why)

    # ---- ending ----

    async def _retire(self, old: _Held, new: _Held) -> None:
        """Let the answers under way at `old` finish, then end it."""
        self._front.remove(old.weights)
        await self._front.drained(old.weights, self._drain)
        self._tell("drained", weights=old.weights, cut_off=self._front.under_way(old.weights))
        if old.server is new.server:
            await self._unload(old)
        else:
            await self._stop(old.server)

    async def _unload(self, held: _Held) -> None:
        if held.checkpoint.kind == "adapter":
            with suppress(CodError):  # it stays loaded, unused
                await held.server.unload_adapter(held.weights)

    async def _stop(self, server: ModelServer) -> None:
        self._forget(server)
        try:
            await server.stop(HURRY if self._hurried.is_set() else GRACE)
        finally:
            self._tell("stopped", weights=server.weights)

    def _forget(self, server: ModelServer) -> None:
        self._servers = [one for one in self._servers if one is not server]

    async def _end(self) -> None:
        for task in (self._bringing, self._retiring, self._reading):
            await _cancelled(task)
        closing = asyncio.create_task(self._front.aclose(self._drain))
        hurried = asyncio.create_task(self._hurried.wait())
        await asyncio.wait({closing, hurried}, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        await asyncio.gather(*map(self._stop, [*self._servers]))
        await closing


def tolerance(engine: Engine) -> float:
    """Nats that what this engine serves may be off: more in 16 bits. May take seconds: vLLM is asked whether it has a GPU."""
    if engine.kind == "vllm" and engine.dtype == "auto":
        from cod_train.serving.vllm import installed, vllm_python

        return TOLERANCE if installed(vllm_python(engine.python)).cpu else TOLERANCE_16BIT
    return TOLERANCE if engine.dtype in ("auto", "float32", "float") else TOLERANCE_16BIT


def _base(checkpoint: Checkpoint) -> Path:
    return checkpoint.base or checkpoint.folder


async def _cancelled(task: asyncio.Task[Any] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


__all__ = ["Serving", "tolerance"]
