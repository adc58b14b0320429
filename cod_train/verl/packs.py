"""What a step is made of: packs to live, groups of recorded rollouts, or some of each.

verl asks for a dataset; an item here is only a place (`world`, `split`, `seed`, `pack`), or the names of recorded rollouts. Each
recorded rollout is used once, older weights first, and not at a step that is further from its weights than `data.max_staleness`.
What is recorded and does not train is counted when the dataset is made, and said.
"""

from __future__ import annotations

import logging
import re
from bisect import bisect_left
from collections import defaultdict
from math import ceil
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


def version_of(rollout: Rollout, name: str) -> int:
    """After which step of the training called `name` the oldest weights of a rollout came; 0: they are the base, or unknown."""
    found = [re.fullmatch(rf"{re.escape(name)}/step-(\d+)", weights) for weights in rollout.weights]
    return min((int(match[1]) if match else 0 for match in found), default=0)


class Packs(Dataset):
    """verl's dataset (`data.custom_cls`): `data_files` is "train" or "eval"."""

    def __init__(self, data_files: Any, tokenizer: Any, config: Any, **_: Any) -> None:
        from omegaconf import OmegaConf

        given = {name: config[name] for name in OURS_IN_DATA if config.get(name) is not None}
        plain: Any = OmegaConf.to_container(OmegaConf.create(given), resolve=True)
        # What is not said in `data` is of no account for which packs there are.
        self.settings = Settings.checked({**plain, "seed": config.get("seed") or 0, "max_tokens": 1})
        self.split = "eval" if "eval" in str(data_files) else "train"
        self._batch, self._group = int(config.train_batch_size), int(config.rollouts_per_pack)
        self._recorded: dict[int, list[Recorded]] = {}
        self.account = Account()
        settings = self.settings
        if self.split == "train" and settings.source != "live":
            self._recorded = self._laid_out(self._groups(tokenizer, str(config.weights_name)))
            logger.warning("recorded: %s", self.account)
        self._at = sorted(self._recorded)
        self._length = settings.eval_packs if self.split == "eval" else settings.train_packs
        if self.split == "train" and settings.source == "recorded":
            self._length = len(self._recorded)
        if self.split == "train" and self._length < self._batch:
            raise UsageError(
                f"a step takes {self._batch} packs and there are {self._length}: lower data.train_batch_size, or record more. "
                f"{self.account if self._recorded else ''}"
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
        if index in self._recorded:
            return {"recorded": self._recorded[index]}
        live = index - bisect_left(self._at, index)
        return {
            "world": settings.worlds[live % len(settings.worlds)],
            "form": settings.form,
            "split": self.split,
            "seed": settings.seed if self.split == "train" else settings.eval_seed,
            "pack": live // len(settings.worlds),
            "size": settings.pack_size,
        }

    def _groups(self, tokenizer: Any, name: str) -> list[tuple[int, list[Recorded]]]:
        """The recorded rollouts that can train, with the version of their weights, in lots of a group's size: those of one pack
        together, those without a pack by environment.

        Raises:
            UsageError: nothing can train; the message has the account.
        """
        groups: dict[tuple[str, str, int], list[Recorded]] = defaultdict(list)

        def spelt(ids: list[int]) -> str:
            return str(tokenizer.decode(ids, skip_special_tokens=True))

        settings = self.settings
        for file in settings.files:
            with look(file) as conn:
                for (run,) in conn.execute("SELECT id FROM runs ORDER BY id").fetchall():
                    read = read_rollout(
                        conn,
                        run,
                        format_penalty=settings.format_penalty,
                        file=str(file),
                        spell=spelt,
                        vocabulary=len(tokenizer),
                    )
                    self.account.take(read)
                    if any(not segment.refused for segment in read.segments):
                        key = read.environment, read.group, version_of(read, name)
                        groups[key].append({"file": str(file), "run": run})
        if not groups:
            raise UsageError(f"nothing recorded there can train. {self.account}")
        most = self._group
        by_age = sorted(groups.items(), key=lambda item: (item[0][2], item[0]))
        return [(key[2], group[at : at + most]) for key, group in by_age for at in range(0, len(group), most)]

    def _laid_out(self, groups: list[tuple[int, list[Recorded]]]) -> dict[int, list[Recorded]]:
        """At which index each recorded group is used."""
        settings = self.settings
        share = 1.0 if settings.source == "recorded" else settings.recorded_share
        out: dict[int, list[Recorded]] = {}
        for version, group in groups:
            index = ceil((len(out) + 1) / share) - 1
            step = index // self._batch + 1
            # A step's own weights are those after the step before it.
            if step - 1 - version > settings.max_staleness:
                reason = f"stale: older than data.max_staleness={settings.max_staleness} steps when their turn came"
                self.account.refuse(reason, f"{group[0]['file']}, for step {step}", len(group))
            else:
                out[index] = group
        return out
