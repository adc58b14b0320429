"""Live rollouts: the runtime's own agent lives through packs and is recorded; what is trained on is read back from the record.

A rollout is therefore the same thing here, in an application and in an evaluation, and the files that are left behind train
as well as any other run database.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from cod_agent import CoDAgent
from cod_agent.environments import make_world
from cod_agent.errors import UsageError
from cod_agent.memory.database import Memory
from cod_agent.models.base import Model
from cod_agent.solvers.base import Solver
from cod_train.rollouts import Rollout, read_rollout

Place = dict[str, Any]
"""Which pack is lived: world, split, seed, pack (its index), size (tasks), form."""

AGENT = "trainee"


class Recorder:
    """Lives packs into one run database.

    Args:
        file: the run database.
        model_for: who answers in a rollout of that name.
        solver: a way to solve of the application's own; the runtime's default otherwise.
        max_context: longest context in characters.
        format_penalty: what a refused update costs.
    """

    def __init__(
        self,
        file: Path,
        model_for: Callable[[str], Model],
        *,
        solver: Solver | None = None,
        max_context: int = 4000,
        gate: str = "open",
        format_penalty: float = 0.1,
    ) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file, self._model_for, self._solver = file, model_for, solver
        self._max_context, self._gate, self._penalty = max_context, gate, format_penalty
        # What a power cut takes can be lived again; kill -9 takes nothing.
        self._memory = Memory.open(file, durable=False)
        self._worlds: dict[tuple[Any, ...], Any] = {}

    async def live(self, place: Place, attempt: str) -> Rollout:
        """Live through a pack once.

        Args:
            attempt: what tells this rollout from the others of its group.

        Raises:
            CodError: what ended the life early; what was recorded stays in the file.
        """
        pack = self._world(place).pack(place["size"], place["pack"])
        name = f"{pack.id}#{attempt}"
        agent = CoDAgent(
            AGENT,
            model=self._model_for(name),
            memory=self._memory,
            environment=pack.environment,
            solver=self._solver,
            max_context=self._max_context,
            gate=self._gate,
        )
        async for _ in agent.run(pack, run=name):
            pass
        return await self._memory.read(self._read(name))

    def discard(self) -> None:
        """Close, and take away the file and what SQLite put beside it."""
        self.close()
        for part in self.file.parent.glob(f"{self.file.name}*"):
            part.unlink(missing_ok=True)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._memory.close()

    def _read(self, name: str) -> Callable[[Any], Rollout]:
        def read(conn: Any) -> Rollout:
            (run,) = conn.execute("SELECT id FROM runs WHERE agent = ? AND name = ?", (AGENT, name)).fetchone()
            return read_rollout(conn, run, format_penalty=self._penalty, file=self.file.name)

        return read

    def _world(self, place: Place) -> Any:
        key = (place["world"], place["seed"], place["split"], place["form"])
        if key not in self._worlds:
            self._worlds[key] = make_world(place["world"], seed=place["seed"], split=place["split"], form=place["form"])
        return self._worlds[key]


def made_solver(name: str | None, base_url: str, model: str) -> Solver | None:
    """The solver that `module:function` makes, called with the endpoint's base URL and the model's name there.

    Raises:
        UsageError: there is no such function, or what it makes cannot be called.
    """
    if not name:
        return None
    module, colon, function = name.partition(":")
    try:
        make = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"no solver {name!r} ({error}): say module:function, a function (base_url, model) -> solver"
        ) from None
    solver = make(base_url, model) if colon else None
    if not callable(solver):
        raise UsageError(f"{name} made {solver!r}, which is no solver: a solver is called with (task, context, tools)")
    return solver
