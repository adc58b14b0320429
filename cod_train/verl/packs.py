"""What a step is made of: packs to live, groups of recorded rollouts, or some of each.

verl asks for a dataset; an item here is only a place (`world`, `split`, `seed`, `pack`), or the names of recorded rollouts. Each
recorded rollout is used once, older weights first, at a step that comes after its weights and is not further from them than
`data.max_staleness`. What is recorded and does not train is counted when the dataset is made, and said. Which rollouts stand
where is written down at the first start (`data.ledger`), so that a training that goes on, goes on with the same ones, though
the databases have grown.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sqlite3
from bisect import bisect_left
from collections import defaultdict
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from cod_agent.environments import make_world
from cod_agent.errors import UsageError
from cod_agent.memory.readonly import look
from cod_train.rollouts import Account, Rollout, Segment, read_rollout
from cod_train.settings import OURS_IN_DATA, Settings

logger = logging.getLogger(__name__)

Recorded = dict[str, Any]
"""file, run (row id): a rollout in a run database; in a place also longest (most tokens of a row; None: any)."""

NOT_YET = "recorded by weights that this training has not made yet"
LEFT_OVER = "left over: what does not fill a last step is not used"


def read_recorded(place: Recorded, settings: Settings, tokenizer: Any) -> Rollout:
    """A rollout out of its file. What is not of this tokenizer, or longer than a row may be, is refused in its segments."""
    with look(place["file"]) as conn:
        return _read(conn, place, settings.format_penalty, tokenizer)


def _read(conn: sqlite3.Connection, place: Recorded, penalty: float, tokenizer: Any) -> Rollout:
    def spelt(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    read = read_rollout(
        conn, place["run"], format_penalty=penalty, file=place["file"], spell=spelt, vocabulary=len(tokenizer)
    )
    if (longest := place.get("longest")) is None:
        return read
    return replace(read, segments=tuple(_fitting(segment, longest) for segment in read.segments))


def _fitting(segment: Segment, longest: int) -> Segment:
    """The segment, refused if a row of it would not fit into a micro-batch. A merged row is as long as the last of its calls."""
    most = max((len(call.prompt) + len(call.sampled) for call in segment.calls), default=0)
    if most <= longest:
        return segment
    reason = f"a row is longer than the {longest} tokens of a micro-batch (actor.ppo_max_token_len_per_gpu)"
    where = f"{segment.kind} at position {segment.position}, {most} tokens"
    return replace(segment, calls=(), refused=reason, where=where)


def version_of(rollout: Rollout, name: str) -> int:
    """After which step of the training called `name` the oldest weights of a rollout came; 0: they are the base, or unknown."""
    found = [re.fullmatch(rf"{re.escape(name)}/step-(\d+)", weights) for weights in rollout.weights]
    return min((int(match[1]) if match else 0 for match in found), default=0)


def _lots(group: list[Recorded], most: int) -> list[list[Recorded]]:
    """A group in parts of at most `most` and as equal as they go, so that none is left with a lone rollout."""
    parts = ceil(len(group) / most)
    cuts = [len(group) * at // parts for at in range(parts + 1)]
    return [group[begin:end] for begin, end in zip(cuts, cuts[1:], strict=False)]


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
        self._longest = config.get("longest_row")
        self._recorded: dict[int, list[Recorded]] = {}
        self._usable: dict[tuple[str, int], int] = {}
        self.account = Account()
        settings = self.settings
        if self.split == "train" and settings.source != "live":
            self._take_recorded(tokenizer, str(config.weights_name), config.get("ledger"))
        self._at = sorted(self._recorded)
        if self.split == "train":
            self._check_length()
        self._length = settings.eval_packs if self.split == "eval" else self._train_length()
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
            return {"recorded": [{**one, "longest": self._longest} for one in self._recorded[index]]}
        live = index - bisect_left(self._at, index)
        return {
            "world": settings.worlds[live % len(settings.worlds)],
            "form": settings.form,
            "split": self.split,
            "seed": settings.seed if self.split == "train" else settings.eval_seed,
            "pack": live // len(settings.worlds),
            "size": settings.pack_size,
        }

    def _train_length(self) -> int:
        return len(self._recorded) if self.settings.source == "recorded" else self.settings.train_packs

    def _take_recorded(self, tokenizer: Any, name: str, ledger: str | None) -> None:
        """Decide which recorded rollouts stand where, or keep to what was decided when this training began.

        Raises:
            UsageError: nothing can train, or it does not make a step; the message has the account.
        """
        made_of = self._made_of(name)
        if ledger is not None and self._kept(Path(ledger), made_of):
            logger.warning("recorded, as %s says: %s", ledger, self.account)
            return
        self._recorded = self._laid_out(self._groups(tokenizer, name))
        self._count_left_over()
        self._check_length()
        logger.warning("recorded: %s", self.account)
        if ledger is not None:
            self._keep(Path(ledger), made_of)

    def _check_length(self) -> None:
        if (length := self._train_length()) < self._batch:
            raise UsageError(
                f"a step takes {self._batch} packs and there are {length}: lower data.train_batch_size, or record more. "
                f"{self.account if self.settings.source != 'live' else ''}"
            )

    def _groups(self, tokenizer: Any, name: str) -> list[tuple[int, list[Recorded]]]:
        """The recorded rollouts that can train, with the version of their weights, oldest first, in lots of a group's size: those
        of one pack together, those without a pack by environment.

        Raises:
            UsageError: nothing can train; the message has the account.
        """
        groups: dict[tuple[int, str, str], list[Recorded]] = defaultdict(list)
        settings = self.settings
        for file in self._files():
            with look(file) as conn:
                for (run,) in conn.execute("SELECT id FROM runs ORDER BY id").fetchall():
                    place = {"file": file, "run": run}
                    read = _read(conn, {**place, "longest": self._longest}, settings.format_penalty, tokenizer)
                    self.account.take(read)
                    if usable := sum(not segment.refused for segment in read.segments):
                        groups[version_of(read, name), read.environment, read.group].append(place)
                        self._usable[file, run] = usable
        if not groups:
            raise UsageError(f"nothing recorded there can train. {self.account}")
        return [(key[0], lot) for key, group in sorted(groups.items()) for lot in _lots(group, self._group)]

    def _files(self) -> list[str]:
        """Each file once, by whatever names it was given."""
        return list(dict.fromkeys(str(file.resolve()) for file in self.settings.files))

    def _laid_out(self, groups: list[tuple[int, list[Recorded]]]) -> dict[int, list[Recorded]]:
        """At which index each recorded group is used."""
        settings = self.settings
        share = 1.0 if settings.source == "recorded" else settings.recorded_share
        out: dict[int, list[Recorded]] = {}
        for version, group in groups:
            index = ceil((len(out) + 1) / share) - 1
            # A step's own weights are those after the step before it.
            age = index // self._batch - version
            if age > settings.max_staleness:
                reason = f"stale: older than data.max_staleness={settings.max_staleness} steps when their turn came"
                self._leave(group, reason, index)
            elif age < 0:
                self._leave(group, NOT_YET, index)
            else:
                out[index] = group
        return out

    def _count_left_over(self) -> None:
        whole = self._train_length() // self._batch * self._batch
        for index, group in self._recorded.items():
            if index >= whole:
                self._leave(group, LEFT_OVER, index)

    def _leave(self, group: list[Recorded], reason: str, index: int) -> None:
        """Count a group that can train and will not."""
        segments = sum(self._usable[one["file"], one["run"]] for one in group)
        self.account.usable -= segments
        where = f"{group[0]['file']}, run {group[0]['run']}, for step {index // self._batch + 1}"
        self.account.refuse(reason, where, segments)

    # ---- the ledger ----

    def _made_of(self, name: str) -> dict[str, Any]:
        """What a layout is kept for: files and dials, not what is in the files nor how much fits into memory."""
        settings = self.settings
        return {
            "files": self._files(),
            "weights": name,
            "source": settings.source,
            "share": settings.recorded_share,
            "staleness": settings.max_staleness,
            "batch": self._batch,
            "group": self._group,
        }

    def _kept(self, ledger: Path, made_of: dict[str, Any]) -> bool:
        """Take the layout out of a ledger that is there and was made of the same.

        Raises:
            UsageError: what is there is no ledger.
        """
        if not ledger.exists():
            return False
        try:
            said = json.loads(ledger.read_text())
            if said["made_of"] != made_of:
                return False
            self._recorded = {int(index): group for index, group in said["groups"].items()}
            refused = {reason: (count, where) for reason, (count, where) in said["account"].pop("refused").items()}
            self.account = Account(**said["account"], refused=refused)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise UsageError(
                f"{ledger} does not say which recorded rollouts stand where ({type(error).__name__}): delete it, and they are "
                "laid out anew"
            ) from None
        return True

    def _keep(self, ledger: Path, made_of: dict[str, Any]) -> None:
        ledger.parent.mkdir(parents=True, exist_ok=True)
        new = ledger.with_name(f"{ledger.name}.{os.getpid()}")
        new.write_text(json.dumps({"made_of": made_of, "groups": self._recorded, "account": asdict(self.account)}))
        new.replace(ledger)
