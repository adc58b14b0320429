"""What an evaluation found, as one object: for a table, a figure, a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cod_agent.environments import Packing, Split
from cod_agent.evaluation.lives import MAIN, NO_CONTEXT, Lane, Watch, lanes_of, live_all
from cod_agent.evaluation.plan import Plan, refuse_mixture, release, set_up
from cod_agent.evaluation.statistics import Curve, Interval, curve, difference
from cod_agent.memory import Memory


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Reward by position of one model in one world, and of its controls on the same packs."""

    world: str
    model: str
    seed: int
    packs: int
    pack_size: int
    main: Curve
    controls: dict[str, Curve]
    benefit: Interval | None
    """At the last position: reward with the context minus without it, pack by pack; None without that control."""
    written: int
    """Updates that wrote a new version."""
    kept: int
    """Updates that were refused; the last good version stayed."""
    calls: int
    seconds: float
    split: Split = "eval"
    packing: Packing = "cod"

    @property
    def amount(self) -> str:
        """In words: `512 packs of 4`."""
        tasks = f"{self.pack_size}" if self.packing == "cod" else f"one task {self.pack_size} times"
        return f"{self.packs:,} packs of {tasks}"

    def json(self) -> dict[str, Any]:
        """One JSON object. `positions` is a list of {position, mean, low, high, n}, and so is each of `controls`."""
        return {
            "world": self.world,
            "split": self.split,
            "packing": self.packing,
            "model": self.model,
            "seed": self.seed,
            "packs": self.packs,
            "pack_size": self.pack_size,
            "positions": [point.json() for point in self.main.points],
            "controls": {name: [point.json() for point in found.points] for name, found in self.controls.items()},
            "mean": self.main.overall.json(),
            "gain": self.main.gain.json(),
            "control_gains": {name: found.gain.json() for name, found in self.controls.items()},
            "benefit": self.benefit and self.benefit.json(),
            "updates": {"written": self.written, "kept": self.kept},
            "lost": self.main.lost,
            "calls": self.calls,
            "seconds": round(self.seconds, 1),
        }


def summarise(plan: Plan, lanes: Sequence[Lane], seconds: float) -> Evaluation:
    """What the lanes hold, which need not be lived to the end."""
    main, controls = lanes[0], lanes[1:]
    bare = next((lane for lane in controls if lane.name == NO_CONTEXT), None)
    return Evaluation(
        world=main.world.name,
        model=main.model.name,
        seed=plan.seed,
        packs=plan.packs,
        pack_size=plan.pack_size,
        main=curve(main.rewards),
        controls={lane.name: curve(lane.rewards) for lane in controls},
        benefit=difference(main.rewards, bare.rewards) if bare else None,
        written=main.written,
        kept=main.kept,
        calls=sum(lane.calls for lane in lanes),
        seconds=seconds,
        split=plan.split,
        packing=plan.packing,
    )


async def evaluate(plan: Plan, memory: Memory, watch: Watch | None = None, *, api_key: str | None = None) -> Evaluation:
    """Live through the packs of a plan and its controls, or go on with it, and say what came of it.

        plan = Plan("frozen-lake:small", "embedded", packs=64, controls=("no-context",))
        found = asyncio.run(evaluate(plan, Memory.open("eval.db")))
        print(found.main.gain)

    Args:
        plan: what to live through.
        memory: the evidence. The same plan on the same file lives only what is missing.
        watch: whom to tell how it goes.
        api_key: of the model's endpoint; never stored.

    Raises:
        UsageError: the plan asks for what there is not, or the file holds something else under its run names.
        ModelError, StoreError: see `cod_agent.errors`; calling again goes on.
    """
    plan, world, model = set_up(plan, api_key=api_key)
    try:
        refuse_mixture(memory, plan, (world.pack(plan.pack_size, pack).id for pack in range(plan.packs)))
        lanes = lanes_of(plan, world, model)
        return summarise(plan, lanes, await live_all(plan, lanes, memory, watch))
    finally:
        await release(model)


__all__ = ["MAIN", "Evaluation", "evaluate", "summarise"]
