"""What a checkpoint does with the packs of a verdict: lived through, recorded, counted.

The lives are those of an evaluation (`cod_agent.evaluation`), in a run database that is the evidence and from which a gate that was
killed goes on. The embedded engine plays a checkpoint's GGUF file in this process; otherwise a model server is started
for it. Nothing is lived before the files are found to be those that were registered, and what will answer is found to say what the
checkpoint's probe says.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cod_agent.environments.base import Form
from cod_agent.errors import CodError, MissingExtra, ReplayDiverged, StoreError, UsageError
from cod_agent.evaluation import Lane, Plan, Watch, lanes_of, live_all, refuse_mixture, release, set_up
from cod_agent.evaluation.statistics import Rewards
from cod_agent.memory import Memory
from cod_agent.memory.readonly import look
from cod_agent.models import LONGEST_POLICY_ANSWER
from cod_agent.models.gguf import fingerprint
from cod_train.checkpoint_files import contents, needed_json
from cod_train.probe import (
    FILE,
    TOLERANCE,
    TOLERANCE_16BIT,
    Comparison,
    Probe,
    compare_file,
    compare_served,
    make_probe,
    separation,
)

if TYPE_CHECKING:
    from cod_train.checkpoints import Checkpoint
    from cod_train.serving import Engine, ModelServer


class Unfit(CodError):
    """A checkpoint cannot be lived with; the message says why."""


class Undecided(CodError):
    """Something else than the candidate was in the way. Nothing was decided; the same again goes on."""


_MACHINE = (Undecided, StoreError, MissingExtra, ReplayDiverged, MemoryError)
"""Trouble that says nothing about a checkpoint: the disk, the installation, the run database."""


@dataclass(frozen=True, slots=True)
class Lived:
    """What came of a checkpoint's packs."""

    weights: str
    """The checkpoint's, as it is served."""
    rewards: Rewards
    """Shape [packs, positions]; NaN where there is none."""
    written: int
    """Updates that wrote a new context."""
    kept: int
    """Updates that were refused."""
    calls: int
    tokens: int
    """Sampled, of all calls."""
    inexact: int
    """Calls that training would refuse."""
    database: Path
    seconds: float

    @property
    def refused(self) -> float:
        """The share of refused updates; 0 where there was none to write."""
        return self.kept / max(1, self.written + self.kept)

    @property
    def lost(self) -> int:
        """Tasks without a finite reward."""
        return int((~np.isfinite(self.rewards)).sum())


def in_process(engine: Engine, *checkpoints: Checkpoint | None) -> bool:
    """Whether they are played in this process: all of them, or none, so that both sides of a verdict are played alike."""
    return engine.kind == "embedded" and all(one is None or one.gguf is not None for one in checkpoints)


def longest_answer(form: Form) -> int | None:
    """In tokens, where nobody says otherwise; the tiny policies are cut where the runtime cuts them, too."""
    return LONGEST_POLICY_ANSWER if form == "compact" else None


async def live(
    checkpoint: Checkpoint, plan: Plan, engine: Engine | None, folder: Path, watch: Watch, *, blame: bool
) -> Lived:
    """Live through the plan's packs with a checkpoint, or go on with it.

    Args:
        plan: all but its model.
        engine: of a model server; None plays the GGUF file in this process.
        folder: the run database goes there, named after the plan's agent.
        watch: whom to tell how it goes.
        blame: whether a server that does not start, or an exception nobody expects, is the checkpoint's fault. It is where another
            checkpoint has just done the same on this machine.

    Raises:
        Unfit: it cannot be lived with.
        Undecided, StoreError: something else is wrong; calling again goes on.
    """
    database = folder / f"{plan.agent}.db"
    with _unfit(blame):
        await asyncio.to_thread(check_files, checkpoint)
        async with _answering(checkpoint, plan, engine, folder, blame) as played:
            lane, seconds = await _lives(played, database, watch)
    names = (checkpoint.gguf_weights,) if engine is None else (checkpoint.weights, f"{checkpoint.weights}/")
    tokens, inexact = _recorded(database, plan.agent, names)
    return Lived(
        checkpoint.weights, lane.rewards, lane.written, lane.kept, lane.calls, tokens, inexact, database, seconds
    )


@contextmanager
def _unfit(blame: bool) -> Iterator[None]:
    try:
        yield
    except (Unfit, *_MACHINE):
        raise
    except OSError as error:
        raise Undecided(str(error)) from error
    except CodError as error:
        raise Unfit(str(error)) from error
    except Exception as error:
        if not blame:
            raise
        raise Unfit(f"{type(error).__name__}: {error}") from error


def check_there(checkpoint: Checkpoint) -> None:
    """Raises: Undecided: its files are away, as with a disk that is not mounted; that says nothing about it."""
    for path in (checkpoint.folder, checkpoint.base, checkpoint.gguf):
        if path is not None and not path.exists():
            raise Undecided(f"{path} of {checkpoint.name} is gone: put it back")


def check_files(checkpoint: Checkpoint) -> None:
    """Raises: Unfit: its files are not those that were registered. Undecided: as `check_there`."""
    check_there(checkpoint)
    held = contents(checkpoint.folder)
    if (held.digest, held.base) != (checkpoint.digest, checkpoint.base):
        raise Unfit(
            f"the files in {checkpoint.folder} changed after {checkpoint.name} was registered: add them under another name"
        )
    if checkpoint.gguf is not None and fingerprint(checkpoint.gguf) != checkpoint.gguf_weights:
        raise Unfit(f"{checkpoint.gguf} is not the file that was registered with {checkpoint.name}")


def _check_probe(checkpoint: Checkpoint, probe: Probe) -> None:
    """What servers will be held against is what the weights that they will load say, whatever else lies beside them. Raises: Unfit."""
    off = separation(make_probe(checkpoint.folder, checkpoint.base), probe)
    if not off <= TOLERANCE:
        raise Unfit(f"{checkpoint.folder / FILE} is {off:.3g} nats off what the weights beside it say")


@asynccontextmanager
async def _answering(
    checkpoint: Checkpoint, plan: Plan, engine: Engine | None, folder: Path, blame: bool
) -> AsyncIterator[Plan]:
    """The plan with the model that plays the checkpoint, which says what its probe says.

    Raises:
        Unfit, Undecided.
    """
    probe = Probe.load(checkpoint.folder)
    if probe.digest != checkpoint.digest:
        raise Undecided(
            f"{checkpoint.folder / FILE} is not of {checkpoint.name}: remove it, and add the folder under another name"
        )
    if blame:
        await asyncio.to_thread(_check_probe, checkpoint, probe)
    if engine is None:
        if checkpoint.gguf is None:
            raise Unfit(f"{checkpoint.name} has no GGUF file: it cannot be played in this process")
        _check_said(checkpoint, str(checkpoint.gguf), await asyncio.to_thread(compare_file, probe, checkpoint.gguf))
        yield replace(plan, model=f"gguf:{checkpoint.gguf}")
        return
    from cod_train.serving import ModelServer, ServerFailed

    try:
        server = await ModelServer.start(checkpoint, engine, folder / "logs")
    except (ServerFailed, UsageError) as error:
        raise (Unfit if blame else Undecided)(str(error)) from error
    try:
        with _unless_killed(server):
            allowed = await asyncio.to_thread(_tolerance, checkpoint, engine)
            found = await compare_served(probe, server.base_url, checkpoint.weights, tolerance=allowed)
            _check_said(checkpoint, server.what, found)
            yield replace(plan, model=f"openai:{checkpoint.weights}", base_url=server.base_url, exact=True)
    finally:
        await server.stop()


@contextmanager
def _unless_killed(server: ModelServer) -> Iterator[None]:
    """A server that was killed (by the system, short of memory, or by a person) speaks neither for nor against a checkpoint."""
    try:
        yield
    except CodError as error:
        if (code := server.ended or 0) < 0:
            raise Undecided(
                f"{server.what} of {server.weights} was killed (signal {-code}); its log is {server.log}"
            ) from error
        raise


def _check_said(checkpoint: Checkpoint, what: str, found: Comparison) -> None:
    if found.trouble:
        raise Unfit(f"{what} does not say what the weights of {checkpoint.name} say: {found.trouble}")


def _tolerance(checkpoint: Checkpoint, engine: Engine) -> float:
    """Of a server's log-probabilities: it computes in 32 bits on a CPU, elsewhere as it is told or as the checkpoint says."""
    from cod_train.serving.vllm import installed, vllm_python

    dtype = engine.dtype
    if engine.kind == "embedded" or (dtype == "auto" and installed(vllm_python(engine.python)).cpu):
        dtype = "float32"
    if dtype == "auto":
        config = needed_json((checkpoint.base or checkpoint.folder) / "config.json")
        dtype = str(config.get("dtype", config.get("torch_dtype")))
    return TOLERANCE if dtype == "float32" else TOLERANCE_16BIT


async def _lives(plan: Plan, database: Path, watch: Watch) -> tuple[Lane, float]:
    plan, world, model = set_up(plan, api_key="none")  # a server of ours needs no key of anybody's
    try:
        memory = Memory.open(database, durable=False)  # a power cut costs packs that can be lived again
        try:
            _check_own(memory, plan, world)
            (lane,) = lanes_of(plan, world, model)
            return lane, await live_all([lane], memory, watch)
        finally:
            memory.close()
    finally:
        await release(model)


def _check_own(memory: Memory, plan: Plan, world: Any) -> None:
    try:
        refuse_mixture(memory, plan, (world.pack(plan.pack_size, pack).id for pack in range(plan.packs)))
    except UsageError as error:
        raise Undecided(str(error)) from None


def _recorded(database: Path, agent: str, names: tuple[str, ...]) -> tuple[int, int]:
    """Sampled tokens, and how many calls training would refuse.

    Args:
        names: what calls may name as their weights; one that ends in / may go on.

    Raises:
        Undecided: a call names other weights.
    """
    trains = "c.inexact = '' AND c.on_policy AND c.sampled_ids IS NOT NULL AND c.logprobs IS NOT NULL"
    query = (
        f"SELECT c.weights, sum(c.sampled_tokens), sum(NOT ({trains})) FROM calls c JOIN episodes e ON e.id = c.episode_id "
        "JOIN runs r ON r.id = e.run_id WHERE r.agent = ? GROUP BY c.weights"
    )
    with look(database) as conn:
        found = conn.execute(query, (agent,)).fetchall()
    for weights, _, _ in found:
        if not any(weights == name or (name.endswith("/") and weights.startswith(name)) for name in names):
            raise Undecided(
                f"{database} has calls that {weights or 'nobody'} answered, not {names[0]}: nothing can be decided from it"
            )
    return sum(row[1] or 0 for row in found), sum(row[2] for row in found)


__all__ = ["Lived", "Undecided", "Unfit", "check_files", "check_there", "in_process", "live", "longest_answer"]
