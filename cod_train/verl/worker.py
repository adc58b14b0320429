"""verl's agent-loop worker, living packs with the runtime's own agent.

Each rollout is recorded in a run database under the training folder and read back as rows. Rows of rollouts that finish
together are handed to TransferQueue at once, with their labels in the tags, so that advantages need no fetch, and
without the columns that the update never reads. A rollout that fails leaves a row of zero weight that says why.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from pathlib import Path
from typing import Any

import ray
import transfer_queue as tq
from verl.experimental.agent_loop.agent_loop import AgentLoopManager
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from cod_agent.models.base import Sampling
from cod_train.batch import rows_of, why_none
from cod_train.live import Recorder, made_solver
from cod_train.model import Drawn, TokenModel
from cod_train.prompts import PromptIds
from cod_train.rollouts import Rollout
from cod_train.settings import Settings
from cod_train.verl import compat
from cod_train.verl.packs import read_recorded, version_of
from cod_train.verl.rows import Stored, padding, stored

logger = logging.getLogger(__name__)

PATIENCE = 0.5
"""Seconds that rollouts which have ended wait for others, to be handed over together."""


class PackWorker(compat.worker_class()):  # type: ignore[misc]
    """Lives the packs it is sent, all at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = Settings.of(self.config)
        self._prompts = PromptIds(self.tokenizer)
        self._ends = frozenset(self.tokenizer.all_special_ids)
        self._recorders: dict[str, Recorder] = {}
        self._waiting: list[tuple[list[Stored], asyncio.Future[None]]] = []
        self._writing: asyncio.Task[None] | None = None
        self._opening, self._living = asyncio.Lock(), 0
        self._endpoint: Any = None

    async def _run_agent_loop(
        self, sampling_params: dict[str, Any], trajectory: dict[str, Any], *, agent_name: str, trace: bool, **kw: Any
    ) -> None:
        """One rollout, from its pack or from a record, into TransferQueue; what goes wrong with it goes there, too."""
        self._living += 1
        try:
            await self._through(sampling_params, trajectory["validate"], kw)
        finally:
            self._living -= 1

    async def _through(self, sampling_params: dict[str, Any], validate: bool, kw: dict[str, Any]) -> None:
        step = kw["global_steps"]
        key = f"{kw['uid']}_{kw['session_id']}"
        try:
            rollout = await self._rollout(kw["place"], f"{kw['session_id']}", sampling_params, step, validate)
            if rollout is None:
                return
            rows = list(rows_of(rollout, merge=self._settings.merge, shaping=self._settings.shaping))
        except Exception as error:
            logger.warning("a rollout of step %s is lost: %s: %s", step, type(error).__name__, error)
            if not validate:
                await self._put([self._lost(key, step, f"{type(error).__name__}: {error}")])
            return
        if validate:
            await self._put_validation(key, rollout, kw)
        elif rows:
            version = version_of(rollout, self._settings.name) if "recorded" in kw["place"] else step - 1
            made = [stored(f"{key}_{number}", row, step, version) for number, row in enumerate(rows)]
            made[0][2]["refused"] = [segment.refused for segment in rollout.segments if segment.refused]
            await self._put(made)
        else:
            await self._put([self._lost(key, step, why_none(rollout))])

    # ---- living ----

    async def _rollout(
        self, place: dict[str, Any], attempt: str, sampling: dict[str, Any], step: int, validate: bool
    ) -> Rollout | None:
        if "recorded" in place:
            # One session for each recorded rollout of the group; the others have nothing to do.
            chosen = place["recorded"]
            at = int(attempt)
            return (
                await asyncio.to_thread(read_recorded, chosen[at], self._settings, self.tokenizer)
                if at < len(chosen)
                else None
            )
        async with self._opening:  # rollouts of a step come all at once, and share one file
            recorder = await self._recorder("eval" if validate else "train", step, sampling)
        return await recorder.live(place, attempt)

    async def _recorder(self, purpose: str, step: int, sampling: dict[str, Any]) -> Recorder:
        known = self._recorders.get(purpose)
        stem = f"{purpose}-{step:06d}-{str(ray.get_runtime_context().get_actor_id())[:8]}"
        if known is None or known.file.stem != stem:
            if known is not None:
                known.close() if self._settings.keep_rollouts or purpose == "eval" else known.discard()
            drawn = Sampling(sampling["temperature"], sampling["top_p"], self._settings.max_tokens)
            file = Path(self.config.trainer.default_local_dir).absolute() / "rollouts" / f"{stem}.db"

            def model(request: str) -> TokenModel:
                return TokenModel(
                    self._settings.name,
                    self.tokenizer,
                    self._generate,
                    sampling=drawn,
                    form=self._settings.form,
                    context_length=self._settings.context_length,
                    prompts=self._prompts,
                    template=self._settings.template,
                    request=request,
                )

            known = self._recorders[purpose] = Recorder(
                file,
                model,
                solver=await self._solver(),
                max_context=self._settings.max_context,
                gate=self._settings.gate,
                format_penalty=self._settings.format_penalty,
            )
        return known

    async def _generate(self, request: str, prompt: list[int], params: dict[str, Any]) -> Drawn:
        out = await self.llm_client.generate(
            request_id=request, prompt_ids=prompt, sampling_params={**params, "logprobs": True}
        )
        # vLLM says "completed" for an answer that was cut off, too.
        longest = min(params["max_tokens"], (self._settings.context_length or math.inf) - len(prompt))
        cut = len(out.token_ids) >= longest and out.token_ids[-1] not in self._ends
        finish = "length" if cut or out.stop_reason == "length" else "stop"
        weights = f"{self._settings.name}/step-{out.extra_fields.get('global_steps') or 0}"
        return Drawn(out.token_ids, out.log_probs or [], finish, weights)

    async def _solver(self) -> Any:
        """The application's own way to solve, if it has one: it speaks HTTP to an endpoint of this process."""
        if not self._settings.solver:
            return None
        if self._endpoint is None:
            from cod_train.endpoint import Endpoint

            rollout = self.config.actor_rollout_ref.rollout
            longest = self._settings.context_length or rollout.prompt_length + rollout.response_length
            self._endpoint = Endpoint(
                self._settings.name,
                self.tokenizer,
                self._generate,
                context_length=longest,
                max_tokens=self._settings.max_tokens,
                template=self._settings.template,
            )
            self._made = made_solver(self._settings.solver, await self._endpoint.start(), self._settings.name)
        return self._made

    # ---- handing over ----

    def _lost(self, key: str, step: int, reason: str) -> Stored:
        return padding(f"{key}_0", int(self.tokenizer.eos_token_id or 0), step, lost=reason)

    async def _put_validation(self, key: str, rollout: Rollout, kw: dict[str, Any]) -> None:
        """The last row, with the reward of every position: what verl's validation averages and logs."""
        # The tokens of the row are of no account.
        key, fields, tags = padding(f"{key}_0", int(self.tokenizer.eos_token_id or 0), kw["global_steps"])
        known = {position: reward for position, reward in enumerate(rollout.rewards) if not math.isnan(reward)}
        info = {f"reward_pos{position}": reward for position, reward in known.items()}
        if known:
            info["acc"] = sum(known.values()) / len(known)
        info["bad_updates"] = float(sum(value < 0 for value in rollout.update_rewards))
        fields |= {"extra_fields": {"reward_extra_info": info}}
        fields |= {name: kw[name] for name in ("uid", "reward_model", "data_source")}
        await tq.async_kv_batch_put(
            keys=[key], fields=list_of_dict_to_tensordict([fields]), tags=[tags], partition_id="val"
        )

    async def _put(self, rows: list[Stored]) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((rows, done))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
        await done

    async def _write(self) -> None:
        """One write for as many rollouts as end within a moment, or for all there are: each costs as much as many rows."""
        while self._waiting:
            until = time.monotonic() + PATIENCE
            while len(self._waiting) < self._living and time.monotonic() < until:
                await asyncio.sleep(PATIENCE / 50)
            batch, self._waiting = self._waiting, []
            rows = [row for some, _ in batch for row in some]
            try:
                await tq.async_kv_batch_put(
                    keys=[key for key, _, _ in rows],
                    fields=list_of_dict_to_tensordict([fields for _, fields, _ in rows]),
                    tags=[tags for _, _, tags in rows],
                    partition_id="train",
                )
            except Exception as error:
                for _, done in batch:
                    done.set_exception(error)
            else:
                for _, done in batch:
                    done.set_result(None)
        self._writing = None


class PackManager(AgentLoopManagerTQ):
    """verl's manager of these workers (`rollout.agent.agent_loop_manager_class`)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.agent_loop_workers_class = ray.remote(PackWorker)
        # Past its parent, which would set verl's own workers.
        AgentLoopManager.__init__(self, *args, **kwargs)
