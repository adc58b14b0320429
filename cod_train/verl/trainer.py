"""verl's synchronous trainer with segment credit.

Four things differ from verl's own: advantages come from the labels of a step's rows, which stand in the tags; rows are laid out so
that every mini-batch has the same profile of lengths on every rank, whatever their number; the update fetches only the columns it reads;
and what was lost is counted with its reason.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.metric import reduce_metrics
from verl.utils.py_functional import rename_dict
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from cod_agent.errors import UsageError
from cod_train.batch import Report, plan
from cod_train.prompts import warn_of_template
from cod_train.settings import CPU_BACKEND, DISAGREEMENT, Settings
from cod_train.verl import compat
from cod_train.verl.rows import UPDATE_READS, computes_advantages_only, padding, row_name, update_options

logger = logging.getLogger(__name__)


class SegmentCreditTrainer(PPOTrainerSync):
    """`trainer_mode=sync`, as `cod_train.verl_main` has it."""

    def __init__(self, config: Any) -> None:
        self.settings = Settings.of(config)
        self._ended: float | None = None
        super().__init__(config=config)

    def _build_replay_buffer(self) -> Any:
        buffer = super()._build_replay_buffer()
        buffer.poll_interval = self.settings.poll_interval  # verl: 2 s
        return buffer

    def get_llm_client(self) -> Any:
        rollout = self.config.actor_rollout_ref.rollout
        if rollout.name != CPU_BACKEND:
            return super().get_llm_client()
        from cod_train.verl.cpu_rollout import CoalescingClient

        handles = [server for replica in self.llm_server_manager.rollout_replicas for server in replica.servers]
        return CoalescingClient(self.config, handles)

    def _init_tokenizer(self) -> None:
        super()._init_tokenizer()
        warn_of_template(self.tokenizer, self.settings.template)

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        # Records may run out before the steps do: the last step there is saves and validates.
        possible = self.steps_per_epoch * self.config.trainer.total_epochs
        self.total_training_steps = min(self.total_training_steps, possible)
        # And the learning rate falls over those, where it does.
        self.config.actor_rollout_ref.actor.optim.total_training_steps = self.total_training_steps

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.global_steps and not (self._checkpoint / "data.pt").is_file():
            # Left by a training in one process: its place in the packs is its step.
            self.train_dataloader_it = iter(self.train_dataloader)
            for _ in range(self.global_steps):
                next(self.train_dataloader_it, None)

    @property
    def _checkpoint(self) -> Path:
        return Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"

    # ---- rows ----

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> KVBatchMeta:
        """Count what came; the rows are laid out when it is known what they are worth."""
        real = [at for at, tag in enumerate(batch.tags) if not tag.get("is_padding")]
        lost = Counter(str(tag["lost"]) for tag in batch.tags if tag.get("lost"))
        metrics["cod/rollouts_lost"] = sum(lost.values())
        for reason, count in lost.items():
            logger.warning("step %s: %s rollouts do not train: %s", self.global_steps, count, reason)
        refused = Counter(reason for tag in batch.tags for reason in tag.get("refused", ()))
        metrics["cod/segments_refused"] = sum(refused.values())
        for reason, count in refused.items():
            logger.warning("step %s: %s segments do not train: %s", self.global_steps, count, reason)
        if not real:
            raise UsageError(
                f"no rollout of step {self.global_steps} can train: "
                + "; ".join(f"{n} x {why}" for why, n in lost.items())
            )
        metrics["cod/rows"] = len(real)
        metrics["cod/trained_tokens"] = sum(batch.tags[at]["label"]["tokens"] for at in real)
        return batch

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        """Those of the sampling stand beside the tokens already."""
        return batch

    # ---- credit ----

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        settings = self.settings
        real = [at for at, tag in enumerate(batch.tags) if not tag.get("is_padding")]
        planned = plan(
            [batch.tags[at]["label"] for at in real],
            [(batch.tags[at]["prompt_len"], batch.tags[at]["response_len"]) for at in real],
            [row_name(batch.tags[at]["label"], batch.keys[at]) for at in real],
            settings.credit,
            mini_batches=settings.mini_batches,
            ranks=compat.dispatch_ranks(self.actor_rollout_wg),
            micro_batches=settings.micro_batches or 1,
            seed=self.global_steps,
            skip=computes_advantages_only(self.config),
        )
        worth = dict(zip(real, planned.worth.tolist(), strict=True))
        per_token = torch.nested.as_nested_tensor(
            [torch.full((tag["response_len"],), worth.get(at, 0.0)) for at, tag in enumerate(batch.tags)],
            layout=torch.jagged,
        )
        fields = TensorDict({"advantages": per_token, "returns": per_token}, batch_size=len(batch))
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
        self._order = [None if at is None else batch.keys[real[at]] for at in planned.order]
        metrics |= credit_metrics(planned.report)
        return batch

    # ---- validation ----

    def _val_metrics_update(
        self, data_sources: Any, sample_uids: Any, reward_extra_infos_dict: Any, sample_turns: Any, *_: Any, **__: Any
    ) -> dict[str, float]:
        """What was lost leaves the means; verl would count it as 0. So would its own `reward`, of rows that have none."""
        ours = {name: values for name, values in reward_extra_infos_dict.items() if name != "reward"}
        out: dict[str, float] = super()._val_metrics_update(data_sources, sample_uids, ours, sample_turns)
        return out

    # ---- the update ----

    def _update_actor(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        order, ranks = self._order, compat.dispatch_ranks(self.actor_rollout_wg)
        batch, spare = self._with_padding(batch, order.count(None))
        tags = dict(zip(batch.keys, batch.tags, strict=True))
        keys = [spare.pop() if key is None else key for key in order]
        only = KVBatchMeta(
            keys=keys,
            tags=[tags[key] for key in keys],
            partition_id=batch.partition_id,
            fields=list(UPDATE_READS),
            extra_info={**batch.extra_info, **update_options(self.config, self.settings, len(keys), ranks)},
        )
        metrics["cod/padding_rows"], metrics["cod/computed_rows"] = order.count(None), len(keys) - order.count(None)
        metrics["cod/tokens"] = sum(tag["seq_len"] for tag in only.tags)
        out = rename_dict(self.actor_rollout_wg.update_actor(only)["metrics"], "actor/")
        out["perf/mfu/actor"] = out.pop("actor/mfu", 0.0)
        metrics.update(reduce_metrics(out))
        warn_of_disagreement(metrics, self.global_steps)
        return batch

    def _with_padding(self, batch: KVBatchMeta, count: int) -> tuple[KVBatchMeta, list[str]]:
        """The batch and rows of zero weight, and these rows' keys."""
        if not count:
            return batch, []
        end, name = int(self.tokenizer.eos_token_id or 0), f"pad{self.global_steps}"
        made = [padding(f"{name}_{at}_0", end, self.global_steps) for at in range(count)]
        keys, fields, tags = (list(part) for part in zip(*made, strict=True))
        tq.kv_batch_put(
            keys=keys, fields=list_of_dict_to_tensordict(fields), tags=tags, partition_id=batch.partition_id
        )
        more = KVBatchMeta(
            keys=batch.keys + keys,
            tags=batch.tags + tags,
            partition_id=batch.partition_id,
            extra_info=batch.extra_info,
        )
        return more, list(keys)

    # ---- where the time goes ----

    def on_step_begin(self) -> None:
        super().on_step_begin()
        now = time.perf_counter()
        self._pending_sync_metrics = {"cod/between_steps_s": now - (self._ended or now)}

    def on_step_end(self) -> None:
        super().on_step_end()
        self._ended = time.perf_counter()


def warn_of_disagreement(metrics: dict[str, Any], step: int) -> None:
    """Say so where rollout server and trainer give the same tokens other probabilities: then nothing that is learnt is sound."""
    if abs(metrics.get("actor/rec_kl", 0.0)) > DISAGREEMENT:
        logger.warning(
            "step %s: the log-probabilities of the sampling are %.3f nats off the trainer's in the mean. The rollout server "
            "computes another model, with other weights or too coarse a precision, or the records are too old",
            step,
            metrics["actor/rec_kl"],
        )


def credit_metrics(report: Report) -> dict[str, float]:
    """What credit made of a step, as metrics."""
    out = {
        "cod/rollouts": float(report.rollouts),
        "cod/refused_updates": report.refused_updates,
        "cod/rewards_lost": float(report.lost),
        "cod/dropped_rows": float(sum(report.dropped.values())),
        "cod/zero_advantage_rows": float(report.zero),
        "cod/red_temperature": report.temperature,
        "cod/rollouts_alone": float(report.alone),
        "cod/advantage_abs": report.advantage_abs,
    }
    out |= {f"cod/reward_pos{position}": reward for position, reward in report.reward.items()}
    if len(report.by_world) > 1:
        for world, rewards in report.by_world.items():
            out |= {f"cod/{world}/reward_pos{position}": reward for position, reward in rewards.items()}
    if report.reward:
        out["cod/reward"] = sum(report.reward.values()) / len(report.reward)
    return out
