"""What a round does, stage after stage; each can be done again from what lies in its folder, and then does nothing twice.

    record   agents live new packs of the train split at the served address; the run databases go on where they were
    train    `cod train` from these databases and the incumbent's weights; it goes on from its checkpoints
    export   the candidate as a Hugging Face folder, renamed when it is whole, and its entry in registry.db
    gate     candidate and incumbent on held-out packs; verdict and promotion are one transaction
    serve    `cod serve` has seen the verdict: it serves the promoted weights, or has taken the promotion back

What a stage brought is noted at its end (`rounds`); `Loop` does what is not noted.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cod_agent.errors import CodError, ModelOverloaded, ModelTimeout, ModelUnreachable
from cod_agent.evaluation import Lane, Plan, Watch, curve, lanes_of, live_all, refuse_mixture, release, set_up
from cod_agent.memory import Memory
from cod_agent.policies import POLICIES, folder_of
from cod_agent.tasks import Outcome
from cod_train.loop import report
from cod_train.loop.children import LOOK, Child, Server
from cod_train.loop.rounds import STAGES, Noted, Round, rounds
from cod_train.verl_main import alone_in

if TYPE_CHECKING:
    from cod_train.checkpoints import Checkpoint, Registry
    from cod_train.loop.settings import Settings
    from cod_train.loop.view import View

ALIAS = "policy"
"""What agents call whatever is promoted."""
PATIENCE = 5
"""Times that agents go on after a server did not answer, without a task done in between."""
_TOLD = {
    "record": "agents live",
    "train": "training",
    "export": "exporting the candidate",
    "gate": "candidate and incumbent live held-out packs",
    "serve": "deploying",
}
READY = 900.0
"""Seconds until `cod serve` must serve what is promoted: two starts of a slow model server and a long drain."""


class Loop:
    """A loop in its folder: `go_on` does what is still to be done.

    Args:
        out: the folder, absolute.
        settings: as the folder keeps them.
        registry: the folder's own.
        view: is told what happens.
    """

    def __init__(self, out: Path, settings: Settings, registry: Registry, view: View) -> None:
        self.out, self.settings, self.registry, self.view = out, settings, registry, view
        words = ["--registry", str(out / "registry.db"), "--name", ALIAS, "--log", str(out / "serve")]
        self.server = Server([*words, *settings.serve.flags], out / "serve" / "output.log")

    async def go_on(self) -> None:
        """Every round that has not ended.

        Raises:
            CodError: what stopped it; everything done until then is kept, and going on does none of it twice.
        """
        self._deploy_base()
        try:
            for number in range(1, self.settings.rounds + 1):
                round = Round(self.out, number)
                if not round.ended:
                    await self._round(round)
        finally:
            await self.server.stop()

    def _deploy_base(self) -> None:
        if self.registry.promoted() is None:
            base = self.settings.base
            folder = folder_of(base) if base in POLICIES else Path(base).resolve()
            first = self.registry.add(folder, name=None if base in POLICIES else folder.name)
            self.registry.promote(first.name, "the base of the loop")
            self.view.event("deployed", f"{first.weights} is deployed first", weights=first.weights)

    async def _round(self, round: Round) -> None:
        incumbent = self._promoted()
        round.begin(incumbent.name, incumbent.weights)
        for stage in STAGES:
            if round.stage(stage) is not None:
                continue
            if stage == "record":
                await self._serving()
            self.view.stage(round.number, stage)
            self.view.curve(report.table(self.out))
            self.view.event(f"{stage}_began", f"round {round.number}: {_TOLD[stage]}")
            began = time.monotonic()
            said = await getattr(self, f"_{stage}")(round)
            round.end(stage, {**said, "seconds": _short(time.monotonic() - began)})
            self.view.event(f"{stage}_ended", report.sentence(round, stage), **round.noted[stage])
        self.view.curve(report.table(self.out))

    def _promoted(self) -> Checkpoint:
        found = self.registry.promoted()
        if found is None:
            raise CodError(
                f"nothing is promoted in {self.out / 'registry.db'}: `cod promote NAME` something, then go on"
            )
        return found

    # ---- record ----

    async def _record(self, round: Round) -> Noted:
        told = self.settings.record
        total, done = told.agents * told.packs * self.settings.pack_size, set()

        def took(lane: Lane, pack: int, outcome: Outcome) -> None:
            done.add((lane.agent, pack, outcome.position))  # an agent that goes on tells again what it has lived
            self.view.progress(len(done), total, "tasks")

        lives = [asyncio.create_task(self._live(round, agent, Watch(outcome=took))) for agent in range(told.agents)]
        try:
            rewards = np.array(await asyncio.gather(*lives))
        finally:
            for life in lives:
                life.cancel()
            await asyncio.gather(*lives, return_exceptions=True)
        with np.errstate(invalid="ignore"):
            by_pack = np.nansum(rewards, 0) / np.isfinite(rewards).sum(0)
        return {**report.points(curve(by_pack)), "lost": int((~np.isfinite(rewards)).sum())}

    async def _live(self, round: Round, agent: int, watch: Watch) -> Any:
        """One agent's life of this round; rewards as [packs, positions]."""
        settings = self.settings
        plan = Plan(
            settings.world,
            f"openai:{ALIAS}",
            packs=settings.record.packs,
            pack_size=settings.pack_size,
            seed=settings.pack_seed(round.number),
            agent=f"agent-{agent}",
            split="train",
            form=settings.form,
            max_tokens=settings.max_tokens,
            base_url=self.server.base_url,
            exact=True,
            concurrency=settings.record.concurrency,
        )
        left, before = PATIENCE, -1
        memory = Memory.open(round.database(agent))
        try:
            while True:
                plan, world, model = set_up(plan, api_key="none")  # a server of ours needs no key of anybody's
                refuse_mixture(memory, plan, (world.pack(plan.pack_size, pack).id for pack in range(plan.packs)))
                (lane,) = lanes_of(plan, world, model)
                try:
                    await live_all([lane], memory, watch)
                    return lane.rewards
                except (ModelUnreachable, ModelOverloaded, ModelTimeout) as error:
                    lived = int(np.isfinite(lane.rewards).sum())
                    left, before = (left - 1 if lived == before else PATIENCE), lived
                    if not left:
                        raise
                    self.view.event("waiting", f"agent-{agent} waits for an answer: {error}", agent=agent)
                    await self._serving()
                finally:
                    await release(model)
        finally:
            memory.close()

    # ---- train ----

    async def _train(self, round: Round) -> Noted:
        from cod_train.progress import steps

        if not self.settings.serve.while_training:
            await self.server.stop()
            self.view.serves("", 0.0)
        await self._alone(round.training)
        child = Child(self._training_words(round), round.folder / "train.log", {"OMP_NUM_THREADS": "1"})
        total = self.settings.train.steps
        try:
            while child.ended is None:
                done = steps(round.training)
                note = f"steps, reward {done[-1].reward:.2f}" if done else "steps"
                self.view.progress(len(done), total, note)
                await asyncio.sleep(LOOK)
        finally:
            await child.stop()
        if child.ended:
            raise CodError(
                f"the training of round {round.number} failed: {child.last_words()}\nIts logs are {child.log} and "
                f"{round.training / 'train.log'}; the same command goes on with it"
            )
        done = steps(round.training)
        return {"steps": len(done), "reward": [_short(step.reward, 4) for step in done]}

    def _training_words(self, round: Round) -> list[str]:
        settings, told = self.settings, self.settings.train
        words = ["train", *(["--in-process"] if told.in_process else []), "--config", told.config]
        for agent in range(settings.record.agents):
            words += ["--from", str(round.database(agent))]
        words += ["--base", str(self.registry.get(round.noted["incumbent"]).folder), "--out", str(round.training)]
        words += ["--steps", str(told.steps), "--packs", str(settings.step_packs)]
        words += ["--group", str(settings.record.agents), "--seed", str(settings.seed), "--form", settings.form]
        words += ["--save-every", str(told.save_every or told.steps), "--eval-packs", "0", "--json"]
        return [*words, f"data.pack_size={settings.pack_size}", *told.keys]

    async def _alone(self, folder: Path) -> None:
        """Wait for a training that outlives a killed loop by a moment.

        Raises:
            UsageError: it goes on and on.
        """
        deadline = time.monotonic() + 60
        while True:
            try:
                with alone_in(folder):
                    return
            except CodError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(LOOK)

    # ---- export ----

    async def _export(self, round: Round) -> Noted:
        from cod_train.export import exported
        from cod_train.progress import newest_checkpoint

        if not round.model.is_dir():  # it is whole where it is
            source = newest_checkpoint(round.training)
            if source is None:
                raise CodError(
                    f"the training of round {round.number} left no checkpoint: see {round.training / 'train.log'}"
                )
            await asyncio.to_thread(exported, source, round.model, name=round.name)
        data = [round.database(agent) for agent in range(self.settings.record.agents)]
        config = self.settings.model_dump(mode="json")
        candidate = self.registry.add(
            round.model, name=round.name, parent=round.noted["incumbent"], data=data, config=config
        )
        return {"name": candidate.name, "weights": candidate.weights}

    # ---- gate ----

    async def _gate(self, round: Round) -> Noted:
        candidate = self.registry.get(round.name)
        if candidate.state == "candidate":
            incumbent = self._promoted()
            if candidate.digest == incumbent.digest:
                self.registry.reject(candidate.name, f"nothing was learnt: these are the weights of {incumbent.name}")
            else:
                await self._judge(round, incumbent)
        verdicts = self.registry.verdicts(candidate.name)
        if not verdicts:
            why = next(change.why for change in self.registry.history(candidate.name) if change.after == "rejected")
            return {"verdict": None, "promoted": False, "why": why, "failed": [], "candidate": None, "incumbent": None}
        said = verdicts[-1].said
        return {
            "verdict": verdicts[-1].id,
            "promoted": verdicts[-1].promoted,
            "why": said["why"],
            "failed": [check["name"] for check in said["checks"] if not check["holds"]],
            **{side: _side(said, side) for side in ("candidate", "incumbent")},
        }

    async def _judge(self, round: Round, incumbent: Checkpoint) -> None:
        """Live the gate's packs and carry the verdict out. A folder for each incumbent: somebody may have promoted another."""
        from cod_train.gate import decide
        from cod_train.serving import Engine

        settings, told, done = self.settings, self.settings.gate, 0

        def took(lane: Lane, pack: int, outcome: Outcome) -> None:
            nonlocal done
            done += 1
            self.view.progress(done, 2 * told.packs * settings.pack_size, f"tasks, {lane.agent}")

        engine = Engine(
            told.engine,
            dtype=settings.serve.dtype,
            max_model_len=settings.serve.max_model_len,
            gpu_memory_utilization=settings.serve.gpu_memory,
            tensor_parallel=settings.serve.tensor_parallel,
        )
        await decide(
            self.registry,
            round.name,
            world=settings.world,
            folder=round.folder / f"gate-{incumbent.name}",
            packs=told.packs,
            pack_size=settings.pack_size,
            margin=told.margin,
            engine=engine,
            form=settings.form,
            max_tokens=settings.max_tokens,
            watch=Watch(outcome=took),
        )

    # ---- serve ----

    async def _serve(self, round: Round) -> Noted:
        serves = await self._serving()
        candidate = self.registry.get(round.name)
        back = ""
        if round.noted["gate"]["promoted"] and candidate.state == "rejected":
            back = self.registry.history(candidate.name)[-1].why
        return {"name": serves.name, "weights": serves.weights, "taken_back": back}

    async def _serving(self) -> Checkpoint:
        """Wait until what is promoted is what serves: a server that died is on its way back, a new promotion may be taken back.

        Raises:
            CodError: `cod serve` has ended, or is not ready in READY seconds.
        """
        self.server.start()
        deadline = time.monotonic() + READY
        while True:
            said, promoted = await self.server.status(), self._promoted()
            if said.get("serving") == promoted.weights and not said.get("coming"):  # else it is still on trial
                self.view.serves(promoted.weights, said.get("since") or time.time())
                return promoted
            if time.monotonic() > deadline:
                raise CodError(
                    f"`cod serve` does not serve {promoted.weights} after {READY:.0f} s ({said.get('trouble') or 'no reason given'}); "
                    f"its log is in {self.out / 'serve'}, and the same command goes on"
                )
            await asyncio.sleep(LOOK)


def _side(said: Noted, side: str) -> Noted | None:
    """One side of a verdict as rounds note it; None where it was not lived."""
    if side not in said["overall"]:
        return None
    return {"positions": [row[side] for row in said["positions"]], "overall": said["overall"][side]}


def ended(out: Path, settings: Settings) -> bool:
    """Whether nothing is to be done any more."""
    done = rounds(out)
    return len(done) >= settings.rounds and all(round.ended for round in done[: settings.rounds])


def _short(value: float, digits: int = 2) -> float | None:
    return round(value, digits) if np.isfinite(value) else None
