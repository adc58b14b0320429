"""What a step is made of: packs to live, groups of recorded rollouts, or some of each.

verl asks for a dataset; an item here is only a place (`world`, `split`, `seed`, `pack`), or the names of recorded rollouts. What is
recorded and cannot train is counted when the dataset is made, and said.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

import torch
from torch.utils.data import Dataset

from cod_agent.environments import make_world
from cod_agent.errors import UsageError
from cod_agent.memory.readonly import look
from cod_train.rollouts import Account, Rollout, read_rollout
from cod_train.settings import OURS_IN_DATA, Settings

logger = logging.getLogger(__name__)

Recorded = dict[str, Any]
"""file, run (row id): a rollout in a run database."""


def read_recorded(place: Recorded, settings: Settings) -> Rollout:
    """A rollout out of its file."""
    with look(place["file"]) as conn:
        return read_rollout(conn, place["run"], format_penalty=settings.format_penalty, file=place["file"])


def recorded_groups(settings: Settings, most: int, tokenizer: Any) -> tuple[list[list[Recorded]], Account]:
    """The recorded rollouts that can train, in groups of at most `most`, each with rollouts of one pack first.

    Rollouts without a group come in lots of `most`, one environment after the other.

    Raises:
        UsageError: nothing can train; the message has the account.
    """
    account = Account()
    groups: dict[tuple[str, str], list[Recorded]] = defaultdict(list)

    def spelt(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    for file in settings.files:
        with look(file) as conn:
            for (run,) in conn.execute("SELECT id FROM runs ORDER BY id").fetchall():
                rollout = read_rollout(
                    conn,
                    run,
                    format_penalty=settings.format_penalty,
                    file=str(file),
                    spell=spelt,
                    vocabulary=len(tokenizer),
                )
                account.take(rollout)
                if any(not segment.refused for segment in rollout.segments):
                    groups[rollout.environment, rollout.group].append({"file": str(file), "run": run})
    if not groups:
        raise UsageError(f"nothing recorded there can train. {account}")
    return [group[at : at + most] for _, group in sorted(groups.items()) for at in range(0, len(group), most)], account


class Packs(Dataset):  # type: ignore[type-arg]
    """verl's dataset (`data.custom_cls`): `data_files` is "train" or "eval"."""

    def __init__(self, data_files: Any, tokenizer: Any, config: Any, **_: Any) -> None:
        from omegaconf import OmegaConf

        given = {name: config[name] for name in OURS_IN_DATA if config.get(name) is not None}
        plain = OmegaConf.to_container(OmegaConf.create(given), resolve=True)
        self.settings = Settings.checked({**plain, "seed": config.get("seed") or 0, "max_tokens": 1})  # type: ignore[dict-item]
        self.split = "eval" if "eval" in str(data_files) else "train"
        self.recorded: list[list[Recorded]] = []
        settings = self.settings
        if self.split == "train" and settings.source != "live":
            self.recorded, account = recorded_groups(settings, int(config.rollouts_per_pack), tokenizer)
            logger.warning("recorded: %s", account)
        if self.split == "eval":
            self._length = settings.eval_packs
        elif settings.source == "recorded":
            self._length = len(self.recorded)
        else:
            self._length = settings.train_packs
        if self.split == "train" and self._length < int(config.train_batch_size):
            raise UsageError(
                f"a step takes {config.train_batch_size} packs and there are {self._length}: lower data.train_batch_size, "
                "or record more"
            )
        for world in settings.worlds:  # an unknown one is an error now, not in a worker
            make_world(world, form=settings.form)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = self._place(index)
        return {
            "dummy_tensor": torch.zeros(1, dtype=torch.uint8),
            "raw_prompt": [{"role": "user", "content": ""}],
            "index": index,
            "agent_name": "pack",
            "place": place,
            "data_source": place.get("world", "recorded"),
            "reward_model": {"ground_truth": ""},
        }

    def _place(self, index: int) -> dict[str, Any]:
        settings = self.settings
        share = {"live": 0.0, "recorded": 1.0, "mixed": settings.recorded_share}[settings.source]
        before, after = int(index * share), int((index + 1) * share)
        if self.split == "train" and after > before:
            return {"recorded": self.recorded[before % len(self.recorded)]}
        live = index - before if self.split == "train" else index
        worlds = settings.worlds
        return {
            "world": worlds[live % len(worlds)],
            "form": settings.form,
            "split": self.split,
            "seed": settings.seed if self.split == "train" else settings.eval_seed,
            "pack": live // len(worlds),
            "size": settings.pack_size,
        }
