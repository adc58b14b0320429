"""Which recorded rollouts a training uses and at which step: real run databases of the embedded policy, and no trainer."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

for package in ("torch", "omegaconf", "transformers", "xllamacpp"):
    pytest.importorskip(package)

from omegaconf import OmegaConf  # noqa: E402
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: E402

from cod_agent import CoDAgent  # noqa: E402
from cod_agent.environments import make_world  # noqa: E402
from cod_agent.errors import UsageError  # noqa: E402
from cod_agent.memory.readonly import look  # noqa: E402
from cod_agent.models import resolve  # noqa: E402
from cod_agent.policies import folder_of  # noqa: E402
from cod_train.rollouts import read_rollout, read_rollouts, sequences  # noqa: E402
from cod_train.settings import Settings  # noqa: E402
from cod_train.verl.packs import Packs, read_recorded  # noqa: E402

TOKENIZER = AutoTokenizer.from_pretrained(folder_of("embedded"))
WORLD = make_world("frozen-lake:tiny", form="compact")


def live(file: Path, agents: Iterable[str], pack: int = 0) -> Path:
    """Each agent's life of the same pack of two tasks, in `file`."""
    model = resolve("embedded", world=WORLD)

    async def lives() -> None:
        for name in agents:
            async with CoDAgent(name, model=model, memory=file) as agent:
                async for _ in agent.run(WORLD.pack(2, pack)):
                    pass

    asyncio.run(lives())
    return file


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine rollouts of a pack, and two of another."""
    file = tmp_path_factory.mktemp("recorded") / "a.db"
    live(file, [f"agent-{number}" for number in range(9)])
    return live(file, ["other-0", "other-1"], pack=1)


def packs(*files: Path, tokenizer: Any = TOKENIZER, **given: Any) -> Packs:
    plain = {
        "source": "recorded",
        "world": "frozen-lake:tiny",
        "form": "compact",
        "recorded": [str(file) for file in files],
        "train_batch_size": 1,
        "rollouts_per_pack": 8,
        "weights_name": "mine",
    }
    return Packs("train", tokenizer, OmegaConf.create(plain | given))


def laid(made: Packs) -> list[list[int]]:
    """Row ids of the runs that stand at each index; [] where a pack is lived."""
    places = [made[index]["place"] for index in range(min(len(made), 20))]
    return [[one["run"] for one in place.get("recorded", [])] for place in places]


def refused(made: Packs) -> dict[str, int]:
    return {reason: count for reason, (count, _) in made.account.refused.items()}


def sampled_by(file: Path, copy: Path, weights: str) -> Path:
    """The same record, sampled by other weights."""
    shutil.copy(file, copy)
    with sqlite3.connect(copy) as conn:
        conn.execute("UPDATE calls SET weights = ?", (weights,))
    return copy


def settings() -> Settings:
    return Settings.checked({"max_tokens": 40})


def test_a_group_that_is_too_large_is_split_evenly(recorded: Path) -> None:
    made = packs(recorded)
    assert sorted(map(len, laid(made))) == [2, 4, 5] and sorted(sum(laid(made), [])) == list(range(1, 12))
    assert sorted(map(len, laid(packs(recorded, rollouts_per_pack=4)))) == [2, 3, 3, 3]
    assert sorted(map(len, laid(packs(recorded, rollouts_per_pack=9)))) == [2, 9]


def test_a_file_counts_once_by_whatever_name(recorded: Path, tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(recorded)
    relative = Path(os.path.relpath(recorded))
    made = packs(recorded, relative, recorded.parent / "." / recorded.name, tmp_path / "link.db")
    assert laid(made) == laid(packs(recorded)) and made.account.rollouts == 11


def test_what_is_read_for_a_step_is_checked_as_when_it_was_laid_out(recorded: Path) -> None:
    from tokenizers import Tokenizer, models

    place = packs(recorded)[0]["place"]["recorded"][0]
    ours = read_recorded(place, settings(), TOKENIZER)
    with look(recorded) as conn:
        assert ours == read_rollout(conn, place["run"], file=place["file"])
    words = {f"word{number}": number for number in range(len(TOKENIZER))}
    fewer = {f"word{number}": number for number in range(5)}
    for vocabulary in (words, fewer):
        stranger = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="word0")), unk_token="word0"
        )
        theirs = read_recorded(place, settings(), stranger)
        assert all("another tokenizer" in segment.refused for segment in theirs.segments)
        with pytest.raises(UsageError, match="another tokenizer"):
            packs(recorded, tokenizer=stranger)


def test_weights_that_this_training_has_not_made_yet_are_refused(recorded: Path, tmp_path: Path) -> None:
    later = sampled_by(recorded, tmp_path / "later.db", "mine/step-2")
    made = packs(recorded, later)
    # Three groups of the base fill steps 1 to 3, so that weights of step 2 are there when they are wanted.
    assert len(made) == 6 and not made.account.refused
    with pytest.raises(UsageError, match="recorded by weights that this training has not made yet"):
        packs(later)
    far = packs(recorded, sampled_by(recorded, tmp_path / "far.db", "mine/step-4"))
    assert len(far) == 3
    assert refused(far) == {"recorded by weights that this training has not made yet": far.account.usable}
    theirs = sampled_by(recorded, tmp_path / "theirs.db", "other/step-4")
    assert len(packs(theirs)) == 3


def test_weights_are_used_before_they_are_too_old(recorded: Path) -> None:
    made = packs(recorded, max_staleness=1)
    assert len(made) == 2
    ((reason, count),) = refused(made).items()
    assert reason.startswith("stale") and made.account.usable + count == made.account.segments


def test_what_does_not_fill_a_last_step_is_counted(recorded: Path) -> None:
    made = packs(recorded, train_batch_size=2)
    (left,) = [segments for reason, segments in refused(made).items() if "last step" in reason]
    # The last group's rollouts have two solves and an update each.
    assert left == 3 * len(laid(made)[-1]) and made.account.usable == 33 - left
    assert not packs(recorded, train_batch_size=3).account.refused
    mixed = packs(recorded, source="mixed", recorded_share=0.5, train_packs=5, train_batch_size=2)
    assert laid(mixed)[1] and laid(mixed)[3] and "last step" in str(mixed.account)
    with pytest.raises(UsageError, match="a step takes 4 packs and there are 3"):
        packs(recorded, train_batch_size=4)


def test_rows_that_fit_into_no_micro_batch_are_refused_alone(recorded: Path) -> None:
    rollouts, _ = read_rollouts([recorded])
    lengths = [
        max(len(made.prompt) + len(made.response) for made in sequences(segment))
        for rollout in rollouts
        for segment in rollout.segments
    ]
    limit = sorted(lengths)[len(lengths) // 2]
    made = packs(recorded, longest_row=limit)
    too_long = sum(length > limit for length in lengths)
    ((reason, count),) = refused(made).items()
    assert f"longer than the {limit} tokens" in reason and count == too_long > 0
    read = [
        read_recorded(place, settings(), TOKENIZER)
        for index in range(len(made))
        for place in made[index]["place"]["recorded"]
    ]
    assert {segment.refused for one in read for segment in one.segments} == {"", reason}
    # As one row or as several.
    rows = [
        row for one in read for segment in one.segments for merge in (True, False) for row in sequences(segment, merge)
    ]
    assert rows and all(len(row.prompt) + len(row.response) <= limit for row in rows)
    assert not packs(recorded, longest_row=max(lengths)).account.refused


def test_a_training_that_goes_on_uses_what_it_began_with(recorded: Path, tmp_path: Path) -> None:
    file, ledger = tmp_path / "live.db", tmp_path / "run" / "recorded.json"
    shutil.copy(recorded, file)
    before = packs(file, ledger=str(ledger), train_batch_size=2)
    live(file, ["late-0", "late-1"])
    assert laid(packs(file, train_batch_size=2)) != laid(before)
    after = packs(file, ledger=str(ledger), train_batch_size=2)
    assert laid(after) == laid(before) and after.account == before.account
    assert [part.name for part in ledger.parent.iterdir()] == ["recorded.json"]
    # Less memory leaves rollouts where they are, and refuses what is too long when its turn comes.
    tight = packs(file, ledger=str(ledger), train_batch_size=2, longest_row=10)
    assert laid(tight) == laid(before)
    read = read_recorded(tight[0]["place"]["recorded"][0], settings(), TOKENIZER)
    assert all("longer than the 10 tokens" in segment.refused for segment in read.segments)
    # Another list of files is another training.
    both = packs(file, recorded, ledger=str(ledger), train_batch_size=2)
    assert both.account.rollouts == 24
    assert json.loads(ledger.read_text())["made_of"]["files"] == [str(file), str(recorded)]


def test_a_ledger_that_says_nothing_is_an_error(recorded: Path, tmp_path: Path) -> None:
    ledger = tmp_path / "recorded.json"
    for text in ("", "[]", "{}", '{"made_of": '):
        ledger.write_text(text)
        with pytest.raises(UsageError, match=r"recorded\.json .* delete it"):
            packs(recorded, ledger=str(ledger))


def test_nothing_is_written_for_a_training_that_cannot_be(recorded: Path, tmp_path: Path) -> None:
    ledger = tmp_path / "recorded.json"
    with pytest.raises(UsageError):
        packs(recorded, ledger=str(ledger), train_batch_size=9)
    assert not ledger.exists()
