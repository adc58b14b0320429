"""Training in this process: verl's own training worker without Ray, TransferQueue or a second process.

The config, the rollouts, the credit, the layout and the update are those of `cod_train.verl_main`, and so are the checkpoints,
which either goes on from. What differs is who carries rows from one to the other: here nobody has to. One model, one rank.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

from cod_agent.errors import UsageError
from cod_agent.models.base import Sampling
from cod_train.batch import Row, gathered, plan
from cod_train.live import Recorder
from cod_train.model import Drawn, TokenModel
from cod_train.rollouts import Rollout
from cod_train.settings import DEVICE, Settings

logger = logging.getLogger(__name__)

Metrics = dict[str, float]


class InProcess:
    """A training run in this process.

    Args:
        config: as `cod_train.verl_main.composed` gives it.

    Raises:
        UsageError: the config wants more than one rank, another device, or a solver that speaks HTTP.
    """

    def __init__(self, config: Any) -> None:
        self.settings = Settings.of(config)
        _check(config, self.settings)
        self.config = config
        self.folder = Path(config.trainer.default_local_dir).absolute()
        _one_process_group(config)
        import torch
        from verl.utils.config import omega_conf_to_dataclass
        from verl.workers.engine_workers import ActorRolloutRefWorker

        from cod_train.engines import engine_for
        from cod_train.prompts import PromptIds, warn_of_template
        from cod_train.verl.packs import Packs

        options = config.actor_rollout_ref.rollout.engine_kwargs.cod_cpu
        torch.set_num_threads(options.train_threads)
        self.tokenizer = omega_conf_to_dataclass(config.actor_rollout_ref.model).tokenizer
        warn_of_template(self.tokenizer, self.settings.template)
        self.train_packs = Packs("train", self.tokenizer, config.data)
        self.eval_packs = Packs("eval", self.tokenizer, config.data)
        # Over so many steps the learning rate falls, where it does. The worker makes its schedule as it starts.
        config.actor_rollout_ref.actor.optim.total_training_steps = self.last_step
        self.worker = ActorRolloutRefWorker(config=config.actor_rollout_ref, role="actor")
        self.worker.init_model()
        self._actor = cast(Any, self.worker.actor)
        self._engine = engine_for(
            Path(config.actor_rollout_ref.model.path),
            slots=options.slots,
            threads=options.threads,
            seed=options.get("seed", 0),
        )
        self._prompts = PromptIds(self.tokenizer)
        self.step = self._resumed()
        self._load_engine()

    # ---- the run ----

    @property
    def last_step(self) -> int:
        """The step it ends with."""
        trainer, size = self.config.trainer, self.config.data.train_batch_size
        possible = len(self.train_packs) // size * trainer.total_epochs
        return int(min(possible, trainer.total_training_steps or possible))

    def fit(self, report: Callable[[int, Metrics], None] = lambda step, metrics: None) -> None:
        """Train to the end, from wherever the folder says.

        Args:
            report: told the metrics of each step, and of step 0 if there is a validation before training.

        Raises:
            UsageError: no rollout of a step can train.
        """
        from omegaconf import OmegaConf
        from verl.utils.tracking import Tracking

        trainer = self.config.trainer
        log = Tracking(
            project_name=trainer.project_name,
            experiment_name=trainer.experiment_name,
            default_backend=list(trainer.logger),
            config=OmegaConf.to_container(self.config, resolve=True),
        )

        def say(metrics: Metrics) -> None:
            log.log(data=metrics, step=self.step)
            report(self.step, metrics)

        try:
            if self.step == 0 and trainer.val_before_train:
                say(self.validate())
            while self.step < self.last_step:
                metrics = self.train_step()
                last = self.step == self.last_step
                if trainer.save_freq > 0 and (last or self.step % trainer.save_freq == 0):
                    self.save()
                if trainer.test_freq > 0 and (last or self.step % trainer.test_freq == 0):
                    metrics |= self.validate()
                say(metrics)
        finally:
            log.finish()

    def train_step(self) -> Metrics:
        """One step: live or read its rollouts, credit them, update, and give the engine the new weights."""
        began = time.perf_counter()
        self.step += 1
        size = self.config.data.train_batch_size
        first = (self.step - 1) * size
        places = [self.train_packs[at % len(self.train_packs)]["place"] for at in range(first, first + size)]
        rollouts, lost = self._rollouts(places, self.config.actor_rollout_ref.rollout.n, "train")
        rows, none, refused = gathered(rollouts, merge=self.settings.merge, shaping=self.settings.shaping)
        lost += none
        for reason, count in lost.items():
            logger.warning("step %s: %s rollouts do not train: %s", self.step, count, reason)
        for reason, count in refused.items():
            logger.warning("step %s: %s segments do not train: %s", self.step, count, reason)
        if not rows:
            why = "; ".join(f"{count} x {reason}" for reason, count in lost.items())
            raise UsageError(f"no rollout of step {self.step} can train: {why}")
        sampled = time.perf_counter()
        metrics = self._update(rows)
        updated = time.perf_counter()
        self._load_engine()
        ended = time.perf_counter()
        return {
            **metrics,
            "cod/rollouts_lost": float(sum(lost.values())),
            "cod/segments_refused": float(sum(refused.values())),
            "timing_s/gen": sampled - began,
            "timing_s/update_actor": updated - sampled,
            "timing_s/update_weights": ended - updated,
            "timing_s/step": ended - began,
        }

    def validate(self) -> Metrics:
        """Reward by position on the eval packs, under the names that verl logs."""
        places = [self.eval_packs[at]["place"] for at in range(len(self.eval_packs))]
        rollouts, _ = self._rollouts(places, self.config.actor_rollout_ref.rollout.val_kwargs.n, "eval")
        out: Metrics = {}
        for world in sorted({rollout.environment for rollout in rollouts}):
            lives = [rollout for rollout in rollouts if rollout.environment == world]
            means = {}
            for position in range(self.settings.pack_size):
                known = [life.rewards[position] for life in lives if life.rewards[position] == life.rewards[position]]
                if known:
                    means[f"val-aux/{world}/reward_pos{position}/mean@1"] = sum(known) / len(known)
            if means:
                out |= {**means, f"val-core/{world}/acc/mean@1": sum(means.values()) / len(means)}
        return out

    def save(self) -> Path:
        """Write a checkpoint, resumable and in Hugging Face form, and say that it is the latest."""
        folder = self.folder / f"global_step_{self.step}"
        keep = self.config.trainer.get("max_actor_ckpt_to_keep")
        self.worker.save_checkpoint(str(folder / "actor"), None, self.step, keep)
        (self.folder / "latest_checkpointed_iteration.txt").write_text(str(self.step))
        return folder

    def close(self) -> None:
        self._engine.close()
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    # ---- its parts ----

    def _resumed(self) -> int:
        from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

        latest = None if self.config.trainer.resume_mode == "disable" else find_latest_ckpt_path(str(self.folder))
        if latest is None:
            return 0
        self.worker.load_checkpoint(str(Path(latest) / "actor"))
        return int(str(latest).rpartition("global_step_")[2])

    def _load_engine(self) -> None:
        weights, _ = self._actor.engine.get_per_tensor_param()
        self._engine.load({name: weight.detach().float().cpu().numpy() for name, weight in weights})

    def _rollouts(self, places: Iterable[Any], times: int, purpose: str) -> tuple[list[Rollout], Counter[str]]:
        recorder = Recorder(
            _unused(self.folder / "rollouts", f"{purpose}-{self.step:06d}"),
            self._model,
            max_context=self.settings.max_context,
            gate=self.settings.gate,
            format_penalty=self.settings.format_penalty,
        )
        try:
            return asyncio.run(self._lived(recorder, list(places), times))
        finally:
            recorder.close() if self.settings.keep_rollouts or purpose == "eval" else recorder.discard()

    async def _lived(self, recorder: Recorder, places: list[Any], times: int) -> tuple[list[Rollout], Counter[str]]:
        from cod_train.verl.packs import read_recorded

        lost: Counter[str] = Counter()

        async def one(place: Any, attempt: int) -> Rollout | None:
            try:
                if "recorded" in place:
                    return read_recorded(place["recorded"][attempt], self.settings, self.tokenizer)
                return await recorder.live(place, str(attempt))
            except Exception as error:
                lost[f"{type(error).__name__}: {error}"] += 1
                return None

        wanted = [(place, attempt) for place in places for attempt in range(len(place.get("recorded", range(times))))]
        lived = await asyncio.gather(*[one(*what) for what in wanted])
        return [rollout for rollout in lived if rollout is not None], lost

    def _model(self, request: str) -> TokenModel:
        rollout = self.config.actor_rollout_ref.rollout
        return TokenModel(
            self.settings.name,
            self.tokenizer,
            self._generate,
            sampling=Sampling(rollout.temperature, rollout.top_p, self.settings.max_tokens),
            form=self.settings.form,
            context_length=self.settings.context_length,
            prompts=self._prompts,
            template=self.settings.template,
            request=request,
        )

    async def _generate(self, request: str, prompt: list[int], params: dict[str, Any]) -> Drawn:
        drawn = await asyncio.wrap_future(self._engine.ask(prompt, **params))
        version = max(0, self.step - 1)
        return Drawn(drawn.ids, drawn.logprobs, drawn.finish, f"{self.settings.name}/step-{version}")

    def _update(self, rows: list[Row]) -> Metrics:
        import torch
        from verl.utils import tensordict_utils as tu
        from verl.utils.metric import reduce_metrics
        from verl.utils.py_functional import rename_dict

        from cod_train.verl.rows import (
            UPDATE_READS,
            computes_advantages_only,
            padding,
            row_name,
            stored,
            update_options,
        )
        from cod_train.verl.trainer import credit_metrics, warn_of_disagreement

        settings, end = self.settings, int(self.tokenizer.eos_token_id or 0)
        named = _numbered(rows)
        planned = plan(
            [row.label for row in rows],
            [(len(row.tokens.prompt), len(row.tokens.response)) for row in rows],
            [row_name(row.label, key) for key, row in named],
            settings.credit,
            mini_batches=settings.mini_batches,
            ranks=1,
            micro_batches=settings.micro_batches or 1,
            seed=self.step,
            skip=computes_advantages_only(self.config),
        )
        laid = [
            (padding("", end, self.step), 0.0)
            if at is None
            else (stored(*named[at], self.step, self.step - 1), float(planned.worth[at]))
            for at in planned.order
        ]
        fields = [
            {name: row[1][name] for name in UPDATE_READS if name != "advantages"}
            | {"advantages": torch.full((row[2]["response_len"],), value)}
            for row, value in laid
        ]
        batch = tu.list_of_dict_to_tensordict(fields)
        tu.assign_non_tensor(batch, **update_options(self.config, settings, len(laid), 1))
        out = reduce_metrics(rename_dict(dict(tu.get(self.worker.update_actor(batch), "metrics")), "actor/"))
        warn_of_disagreement(out, self.step)
        tokens = {
            "cod/rows": float(len(rows)),
            "cod/padding_rows": float(planned.order.count(None)),
            "cod/computed_rows": float(len(laid) - planned.order.count(None)),
            "cod/tokens": float(sum(row[2]["seq_len"] for row, _ in laid)),
            "cod/trained_tokens": float(sum(row.label["tokens"] for row in rows)),
        }
        return {**{name: float(value) for name, value in out.items()}, **tokens, **credit_metrics(planned.report)}


def _numbered(rows: list[Row]) -> list[tuple[str, Row]]:
    """Keys whose end is the number of a row in its rollout, as verl's are."""
    seen: Counter[str] = Counter()
    out = []
    for row in rows:
        name = str(row.label["rollout"])
        out.append((f"{name}_{seen[name]}", row))
        seen[name] += 1
    return out


def _unused(folder: Path, stem: str) -> Path:
    """A file that is not there yet: what an interrupted run recorded for the step stays as it is."""
    for number in range(1, 10_000):
        file = folder / (f"{stem}.db" if number == 1 else f"{stem}-{number}.db")
        if not file.exists():
            return file
    raise UsageError(f"{folder} has thousands of recordings of {stem}: choose another folder")


def _check(config: Any, settings: Settings) -> None:
    ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node
    if config.trainer.device != "cpu" or ranks != 1:
        raise UsageError(
            f"in one process there is one rank, on the CPU, and this config has {ranks} on {config.trainer.device}: leave out "
            "--in-process"
        )
    if settings.solver:
        raise UsageError("a solver that speaks HTTP needs the rollout server: leave out --in-process")
    if config.data.shuffle:
        raise UsageError("in one process packs are taken in order: set data.shuffle=false")


def _one_process_group(config: Any) -> None:
    """What verl's worker reads from its environment, and the CPU platform."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ[DEVICE] = "cpu"
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from cod_train.verl import compat

    compat.check_version()
    from cod_train.verl import plugin

    plugin.use_cpu()  # composing the config may have imported verl before it was known where to compute
