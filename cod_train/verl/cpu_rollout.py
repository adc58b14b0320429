"""verl's rollouts on a machine without a GPU: a few Ray actors that sample small models in batches.

Each has an engine (`cod_train.engines`). Weights come as one object a step. The client sends what arrives in one turn of the event
loop as one Ray call, and a rollout always to the same actor, which has its keys and values.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import ray
import torch
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

from cod_agent.errors import ModelError
from cod_train.settings import CPU_BACKEND


class Server:
    """A Ray actor that samples."""

    def __init__(self, folder: str, slots: int, threads: int, seed: int) -> None:
        from cod_train.engines import engine_for

        torch.set_num_threads(threads)
        self._engine = engine_for(Path(folder), slots=slots, threads=threads, seed=seed)
        self._version = 0

    async def generate_many(self, requests: list[tuple[list[int], dict[str, Any]]]) -> list[tuple[Any, ...]]:
        """[(prompt ids, sampling parameters)] -> [(ids, log-probabilities, finish, version of the weights)], or an error instead."""
        return await asyncio.gather(*[self._answer(prompt, params) for prompt, params in requests])

    async def _answer(self, prompt: list[int], params: dict[str, Any]) -> tuple[Any, ...]:
        try:
            drawn = await asyncio.wrap_future(self._ask(prompt, params))
        except Exception as error:  # one bad request is not the others' business
            return (f"{type(error).__name__}: {error}",)
        return drawn.ids, drawn.logprobs, drawn.finish, self._version

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> TokenOutput:
        """verl's own interface."""
        [answer] = await self.generate_many([(list(prompt_ids), sampling_params)])
        ids, logprobs, finish, version = _sound(answer)
        extra = {"global_steps": version}
        return TokenOutput(token_ids=ids, log_probs=logprobs, stop_reason=finish, num_preempted=0, extra_fields=extra)

    def _ask(self, prompt: list[int], params: dict[str, Any]) -> Any:
        return self._engine.ask(
            prompt,
            temperature=params.get("temperature", 1.0),
            top_p=params.get("top_p", 1.0),
            max_tokens=params.get("max_tokens"),
            seed=params.get("seed"),
        )

    async def load_weights(self, weights: dict[str, Any], version: int | None) -> None:
        await asyncio.to_thread(self._engine.load, weights)
        self._version = self._version if version is None else version

    async def _nothing(self, *args: Any, **kwargs: Any) -> None: ...

    wake_up = sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = _nothing
    abort_all_requests = resume_generation = start_profile = stop_profile = set_global_steps = _nothing


def _sound(answer: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(answer) == 1:
        raise ModelError(answer[0])
    return answer


def _options(rollout: Any) -> dict[str, Any]:
    given = dict((rollout.engine_kwargs or {}).get(CPU_BACKEND) or {})
    return {"servers": 1, "slots": 64, "threads": 1, "train_threads": 1, "seed": 0} | given


def _server_name(rank: int, number: int) -> str:
    return f"{CPU_BACKEND}_{rank}_{number}"


class Replica(RolloutReplica):
    """The servers of one rollout replica."""

    async def launch_servers(self) -> None:
        options = _options(self.config)
        actor: Any = ray.remote(Server)
        self.servers = [
            actor.options(
                name=_server_name(self.replica_rank, number), num_cpus=0, max_concurrency=self.max_concurrency
            ).remote(
                self.model_config.path,
                slots=options["slots"],
                threads=options["threads"],
                seed=options["seed"] + 1000 * self.replica_rank + number,
            )
            for number in range(options["servers"])
        ]
        self._server_handle = self.servers[0]
        self._server_address = f"ray-actor:{_server_name(self.replica_rank, 0)}"

    async def sleep(self) -> None:
        """Nothing to free; verl would ask each server."""

    async def wake_up(self) -> None: ...


class ServerAdapter(BaseRollout):
    """In the training worker: sends the weights to the servers of its replica, as one object."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        self._rank = int(os.environ["RANK"]) if replica_rank == -1 else replica_rank
        self._options = _options(config)
        self._handles: list[Any] = []

    async def resume(self, tags: Any) -> None: ...

    async def release(self) -> None: ...

    async def update_weights(self, weights: Any, global_steps: int | None = None, **_: Any) -> None:  # type: ignore[override]
        # Here, because it counts for the thread that says it, and this one computes the updates.
        torch.set_num_threads(self._options["train_threads"])
        if not self._handles:
            numbers = range(self._options["servers"])
            self._handles = [ray.get_actor(_server_name(self._rank, number)) for number in numbers]
        sent = ray.put({name: weight.detach().float().cpu().numpy() for name, weight in weights})
        await asyncio.gather(*[handle.load_weights.remote(sent, global_steps) for handle in self._handles])


class CoalescingClient(LLMServerClient):
    """What workers ask: requests of one turn of the event loop travel in one Ray call to each server."""

    def __init__(self, config: Any, handles: list[Any]) -> None:
        super().__init__(config)
        self._servers = handles
        self._pending: dict[int, list[tuple[tuple[list[int], dict[str, Any]], asyncio.Future[Any]]]] = {}
        self._sending: set[asyncio.Task[None]] = set()

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> TokenOutput:
        """One answer. `request_id` names the conversation."""
        at = hash(request_id) % len(self._servers)
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        waiting = self._pending.setdefault(at, [])
        waiting.append(((prompt_ids, sampling_params), done))
        if len(waiting) == 1:
            sending = asyncio.create_task(self._send(at))
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)
        ids, logprobs, finish, version = _sound(await done)
        extra = {"global_steps": version, "min_global_steps": version, "max_global_steps": version}
        return TokenOutput(token_ids=ids, log_probs=logprobs, stop_reason=finish, num_preempted=0, extra_fields=extra)

    async def _send(self, at: int) -> None:
        known = 0
        while known != len(self._pending[at]):  # until a turn of the loop brings nothing new
            known = len(self._pending[at])
            await asyncio.sleep(0)
        batch = self._pending.pop(at)
        try:
            answers = await self._servers[at].generate_many.remote([asked for asked, _ in batch])
        except Exception as error:
            for _, done in batch:
                if not done.done():
                    done.set_exception(error)
            return
        for (_, done), answer in zip(batch, answers, strict=True):
            if not done.done():
                done.set_result(answer)
