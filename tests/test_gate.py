"""The promotion gate: what its bounds promise, what it promotes, and that a spoilt candidate is rejected for what is wrong with it."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("torch", "transformers", "gguf", "xllamacpp", "jinja2"):
    pytest.importorskip(package)

from safetensors.numpy import load_file, save_file  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from cod_agent.errors import StoreFull, UnknownName, UsageError  # noqa: E402
from cod_agent.evaluation import Watch, at_least  # noqa: E402
from cod_agent.evaluation.statistics import student  # noqa: E402
from cod_agent.models.openai import OpenAIModel  # noqa: E402
from cod_agent.policies import folder_of  # noqa: E402
from cod_train import gate, gate_lives  # noqa: E402
from cod_train.checkpoint_files import contents  # noqa: E402
from cod_train.checkpoints import Checkpoint, KeptVerdict, Registry  # noqa: E402
from cod_train.cli import promote as promote_command  # noqa: E402
from cod_train.cli import rollback as rollback_command  # noqa: E402
from cod_train.gate import Undecided, checks, compare, decide  # noqa: E402
from cod_train.gate_lives import Lived  # noqa: E402
from cod_train.gate_rule import Verdict, spelt, why  # noqa: E402
from cod_train.gguf_file import write_gguf  # noqa: E402
from cod_train.serving import Engine, ModelServer  # noqa: E402

WORLD = "frozen-lake:small"
PACKS = 24
WIDE = 0.5
"""A margin for verdicts of few packs: they are about something else."""
THIRD, END, CLOSES = 491, 3, 503
"""Tokens of the tiny policies: ` Direction 3`, the end of a turn, `</context>`."""


# ---- bounds ----


def test_students_quantiles_are_those_of_the_tables() -> None:
    for freedom, known in ((4, 2.1318), (7, 1.8946), (15, 1.7531), (31, 1.6955), (511, 1.6478)):
        assert student(0.95, freedom) == pytest.approx(known, abs=1e-3)


def test_the_lower_end_keeps_its_word() -> None:
    """In 95 of 100 samples the truth lies above it, for few packs and for many; near the ends of the scale in 92."""
    dice = np.random.default_rng(11)
    inside, near_an_end = (((8, 0.5, 0.5), (32, 0.3, 0.3), (512, 0.6, 0.6)), ((512, 0.9, 1.0), (64, 0.9, 0.97)))
    for cases, allowed in ((inside, 0.07), (near_an_end, 0.085)):
        for packs, ours, theirs in cases:
            drawn = [(dice.random((3000, packs)) < rate).astype(float) for rate in (ours, theirs)]
            lows = np.array([at_least(row).low for row in drawn[0] - drawn[1]])
            assert 0.03 <= (lows > ours - theirs).mean() <= allowed


def test_packs_that_never_differ_do_not_prove_that_none_does() -> None:
    assert at_least(np.zeros(512)).low == pytest.approx(-3 / 512, rel=0.01)
    assert at_least(np.zeros(8)).low == pytest.approx(-0.312, abs=1e-3)
    assert math.isnan(at_least(np.array([1.0, np.nan])).low)


def test_the_verdict_does_not_depend_on_the_scale_of_the_rewards() -> None:
    for ours, theirs in (
        (STRONG, WEAK),
        (STRONG, STRONG),
        (WEAK, STRONG),
        ((0.3, 1.0, 1.0, 1.0), (0.2, 1.0, 1.0, 1.0)),
    ):
        candidate, incumbent = drawn(1, ours), drawn(2, theirs)
        plain = checks(lived(candidate), lived(incumbent))
        large = checks(lived(4 * candidate), lived(4 * incumbent))
        assert [check.holds for check in plain] == [check.holds for check in large]
        for one, four in zip(plain[:2], large[:2], strict=True):
            assert (four.figure, four.bound) == (pytest.approx(4 * one.figure), 4 * one.bound)


def test_a_bound_is_paired() -> None:
    """What both share of a pack's luck falls out: a small difference shows that two intervals would hide."""
    packs = np.random.default_rng(3).random(200)
    ours, theirs = packs + 0.02 + np.random.default_rng(4).normal(0, 0.1, 200), packs
    assert at_least(ours - theirs).low > 0
    assert at_least(ours).low < theirs.mean()


# ---- the rule, on tables of rewards ----


def lived(rewards: Any, **more: Any) -> Lived:
    rewards = np.asarray(rewards, float)
    tasks = rewards.size
    given = {"written": 300, "kept": 0, "calls": 4 * tasks, "tokens": 20 * tasks, "inexact": 0, "seconds": 1.0}
    return Lived(weights="w@0", rewards=rewards, database=Path("w.db"), **{**given, **more})


def drawn(seed: int, rates: tuple[float, ...], packs: int = 512) -> np.ndarray:
    return (np.random.default_rng(seed).random((packs, len(rates))) < rates).astype(float)


def failing(candidate: Lived, incumbent: Lived | None, margin: float = 0.1) -> list[str]:
    return [check.name for check in checks(candidate, incumbent, margin) if not check.holds]


WEAK, STRONG = (0.2, 0.25, 0.25, 0.2), (0.5, 0.85, 0.95, 0.95)


def test_no_difference_is_called_better_five_times_in_a_hundred() -> None:
    for rates in (WEAK, STRONG):
        called = sum(
            not {"better"} & set(failing(lived(drawn(2 * n, rates)), lived(drawn(2 * n + 1, rates))))
            for n in range(600)
        )
        assert 0.02 <= called / 600 <= 0.075


def test_a_gain_of_five_hundredths_is_seen_with_512_packs() -> None:
    better = tuple(rate + 0.05 for rate in WEAK)
    seen = sum(not failing(lived(drawn(2 * n, better)), lived(drawn(2 * n + 1, WEAK))) for n in range(100))
    assert seen >= 90


def test_a_position_may_not_pay_for_the_others() -> None:
    """Better on average, and worse at the first task: agents that have just begun would feel it."""
    paid = (0.3, 0.85, 0.95, 0.95)
    assert failing(lived(drawn(1, paid)), lived(drawn(2, (0.5, 0.6, 0.7, 0.7)))) == ["no position worse"]


def test_few_packs_cannot_show_that_no_position_is_worse() -> None:
    """That is why the bound is asked and not the mean: at 8 packs a mean above -.1 says nothing."""
    assert "no position worse" in failing(lived(drawn(5, (0.5,) * 4, 8)), lived(drawn(6, (0.5,) * 4, 8)))


@pytest.mark.parametrize(
    ("spoilt", "names"),
    [
        ({"kept": 20, "written": 280}, ["updates parse"]),  # 6.7 % refused
        ({"kept": 10, "written": 290}, ["updates parse"]),  # 3.3 %, the incumbent none
        ({"kept": 5, "written": 295}, []),
        ({"kept": 1, "written": 23}, []),  # 4.2 %, and yet only one
        ({"inexact": 1}, ["answers are exact"]),
        ({"calls": 4 * 2048 * 2}, ["calls"]),
        ({"tokens": 20 * 2048 * 2}, ["tokens"]),
    ],
)
def test_more_reward_does_not_pay_for(spoilt: dict[str, int], names: list[str]) -> None:
    assert failing(lived(drawn(1, STRONG), **spoilt), lived(drawn(2, WEAK))) == names


def test_a_task_without_a_reward_is_a_loss() -> None:
    rewards = drawn(1, STRONG)
    rewards[7, 2] = np.nan
    assert failing(lived(rewards), lived(drawn(2, WEAK))) == ["nothing is lost"]


def test_an_incumbent_with_refusals_gives_no_licence_for_more() -> None:
    """But who refuses fewer may replace it, or a loop from a bad base would never leave it."""
    theirs = lived(drawn(2, WEAK), written=270, kept=30)
    assert failing(lived(drawn(1, STRONG), written=255, kept=45), theirs) == ["updates parse"]
    assert failing(lived(drawn(1, STRONG), written=280, kept=20), theirs) == []


def test_an_engine_that_is_not_exact_is_not_held_against_a_candidate() -> None:
    assert failing(lived(drawn(1, STRONG), inexact=8192), lived(drawn(2, WEAK), inexact=8192)) == []


def test_the_first_is_asked_only_what_needs_no_comparison() -> None:
    assert failing(lived(drawn(1, WEAK)), None) == []
    assert failing(lived(drawn(1, WEAK), kept=100, inexact=3), None) == ["updates parse", "answers are exact"]


def test_a_verdict_is_one_json_object() -> None:
    ours, theirs = lived(drawn(1, STRONG)), replace(lived(drawn(2, WEAK)), weights="v@1")
    found = checks(ours, theirs)
    verdict = Verdict("w@0", "v@1", why(ours, theirs, found), found, {"seed": 7}, ours, theirs)
    said = json.loads(json.dumps(verdict.json(), allow_nan=False))
    assert verdict.promoted and said["promoted"] and said["seed"] == 7
    assert [row["position"] for row in said["positions"]] == [0, 1, 2, 3]
    row = said["positions"][3]
    assert row["candidate"]["mean"] - row["incumbent"]["mean"] == pytest.approx(row["difference"]["mean"], abs=1e-5)
    assert row["difference"]["low"] < row["difference"]["mean"]
    table = np.array([[float(letter) for letter in word] for word in said["rewards"]["candidate"].split()])
    assert (table == ours.rewards).all()


def test_rewards_that_are_not_0_and_1_are_kept_as_numbers() -> None:
    assert spelt(np.array([[0, 1], [1, np.nan]])) == "01 1-"
    assert spelt(np.array([[0.25, np.nan]])) == [[0.25, None]]


# ---- real policies ----


def add(registry: Registry, folder: Path, name: str) -> Checkpoint:
    return registry.add(folder, name=name)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A registry in which embedded-base is promoted, and which tests copy."""
    made = tmp_path_factory.mktemp("registry")
    with Registry(made / "registry.db", create=True) as registry:
        for policy in ("embedded-base", "embedded", "naive-base"):
            add(registry, folder_of(policy), policy)
        registry.promote("embedded-base", "to begin with")
    yield made


@pytest.fixture
def registry(home: Path, tmp_path: Path) -> Iterator[Registry]:
    shutil.copytree(home, tmp_path / "r")
    with Registry(tmp_path / "r" / "registry.db") as opened:
        yield opened


def decided(registry: Registry, name: str, folder: Path, **more: Any) -> KeptVerdict:
    return asyncio.run(decide(registry, name, world=WORLD, folder=folder, **{"packs": PACKS, **more}))


def failed(kept: KeptVerdict) -> list[str]:
    return [check["name"] for check in kept.said["checks"] if not check["holds"]]


def spoilt(folder: Path, change: Callable[[dict[str, np.ndarray]], None], of: str = "embedded") -> Path:
    """A copy of a shipped policy with other weights, and the GGUF file that belongs to them."""
    shutil.copytree(folder_of(of), folder, ignore=shutil.ignore_patterns("CARD.md", "model.gguf"))
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    write_gguf(folder, folder / "model.gguf")
    return folder


def without(token: int) -> Callable[[dict[str, np.ndarray]], None]:
    """The row of a token zeroed: it is neither read nor said any more."""

    def change(weights: dict[str, np.ndarray]) -> None:
        weights["model.embed_tokens.weight"][token] = 0

    return change


def noise(weights: dict[str, np.ndarray]) -> None:
    dice = np.random.default_rng(0)
    for name, tensor in weights.items():
        weights[name] = (tensor + dice.normal(0, 0.15, tensor.shape)).astype(tensor.dtype)


def test_the_better_one_is_promoted_and_the_worse_one_rejected(registry: Registry, tmp_path: Path) -> None:
    kept = decided(registry, "embedded", tmp_path / "up", margin=WIDE)
    assert kept.promoted and (kept.candidate, kept.incumbent) == ("embedded", "embedded-base")
    assert kept.said["overall"]["difference"]["low"] > 0.4
    states = {one.name: one.state for one in registry.all()}
    assert states == {"embedded-base": "retired", "embedded": "promoted", "naive-base": "candidate"}
    assert registry.history("embedded")[-1].verdict == kept.id

    worse = decided(registry, "naive-base", tmp_path / "down")
    assert not worse.promoted and failed(worse) == ["better", "no position worse"]
    assert registry.get("naive-base").state == "rejected"
    promoted = registry.promoted()
    assert promoted is not None and promoted.name == "embedded"
    assert worse.said["seed"] != kept.said["seed"]
    again = add(registry, registry.get("embedded-base").folder, "base-again")
    why_not = failed(decided(registry, again.name, tmp_path / "back"))
    # Of its updates some are refused, too: with few packs that may count or not. Nothing else may.
    assert [name for name in why_not if name != "updates parse"] == ["better", "no position worse"]


def test_both_lived_the_same_packs_and_the_databases_say_who_answered(registry: Registry, tmp_path: Path) -> None:
    kept = decided(registry, "embedded", tmp_path / "g", packs=8)
    packs = []
    for role in ("candidate", "incumbent"):
        with sqlite3.connect(tmp_path / "g" / kept.said["databases"][role]) as conn:
            packs.append(sorted(name for (name,) in conn.execute("SELECT name FROM runs")))
            (weights,) = [row[0] for row in conn.execute("SELECT DISTINCT weights FROM calls")]
        checkpoint = registry.of_weights(weights)
        assert checkpoint is not None and checkpoint.weights == kept.said[role]
    assert (
        packs[0] == packs[1] and len(packs[0]) == 8 and all(f"/eval/{kept.said['seed']}/" in name for name in packs[0])
    )


def test_the_first_of_a_registry_is_promoted_and_says_so(home: Path, tmp_path: Path) -> None:
    with Registry(tmp_path / "registry.db", create=True) as registry:
        add(registry, home / "checkpoints" / "naive-base", "first")
        kept = decided(registry, "first", tmp_path / "g", packs=8)
        assert kept.promoted and kept.incumbent is None and "nothing to compare" in kept.said["why"]
        assert kept.said["positions"][0]["difference"] is None


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (noise, {"better", "no position worse"}),
        (without(THIRD), {"better", "no position worse"}),
        (without(END), {"better", "tokens"}),
        (without(CLOSES), {"updates parse", "no position worse"}),
    ],
    ids=["noise on the weights", "a token that is gone", "answers without an end", "updates that do not parse"],
)
def test_spoilt_weights_are_rejected(
    registry: Registry, tmp_path: Path, change: Callable[[dict[str, np.ndarray]], None], names: set[str]
) -> None:
    registry.promote("embedded", "by hand")
    add(registry, spoilt(tmp_path / "spoilt", change), "spoilt")
    kept = decided(registry, "spoilt", tmp_path / "g")
    assert not kept.promoted and names <= set(failed(kept))
    assert registry.get("spoilt").state == "rejected" and registry.get("embedded").state == "promoted"


def test_a_generation_config_does_not_matter(registry: Registry, tmp_path: Path) -> None:
    shutil.copytree(folder_of("embedded"), tmp_path / "other")
    (tmp_path / "other" / "generation_config.json").write_text('{"temperature": 9.0, "top_k": 1, "eos_token_id": 3}')
    add(registry, tmp_path / "other", "other")
    kept = decided(registry, "other", tmp_path / "g", packs=2 * PACKS, margin=WIDE)
    assert kept.promoted, kept.said["why"]


def test_a_gguf_file_of_other_weights_is_found_before_anything_is_lived(registry: Registry, tmp_path: Path) -> None:
    shutil.copytree(folder_of("embedded"), tmp_path / "mixed")
    shutil.copy(folder_of("naive-base") / "model.gguf", tmp_path / "mixed" / "model.gguf")
    try:
        add(registry, tmp_path / "mixed", "mixed")
    except UsageError:  # a registry that compares them itself
        return
    kept = decided(registry, "mixed", tmp_path / "g", packs=8)
    assert not kept.promoted and "does not say what the weights of mixed say" in kept.said["why"]
    assert not (tmp_path / "g" / "candidate.db").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "model.gguf", "chat_template.jinja"])
def test_files_that_changed_after_they_were_registered_are_rejected(
    registry: Registry, tmp_path: Path, file: str
) -> None:
    shutil.copytree(folder_of("embedded"), tmp_path / "changed")
    add(registry, tmp_path / "changed", "changed")
    path = tmp_path / "changed" / file
    path.write_bytes(path.read_bytes()[:-2] + b"  ")
    kept = decided(registry, "changed", tmp_path / "g", packs=8)
    reasons = ("changed after", "not the file that was registered", "the chat template of")
    assert not kept.promoted and any(reason in kept.said["why"] for reason in reasons)


@pytest.mark.parametrize("what", ["template", "tokenizer"])
def test_another_language_is_refused_or_rejected(registry: Registry, tmp_path: Path, what: str) -> None:
    """The registry refuses a child that speaks otherwise than its parent; the gate one that speaks otherwise than the incumbent."""
    folder = tmp_path / "other"
    shutil.copytree(folder_of("embedded"), folder, ignore=shutil.ignore_patterns("CARD.md", "model.gguf"))
    if what == "template":
        path = folder / "chat_template.jinja"
        path.write_text(path.read_text().replace("<|user|>", "<|user|> "))
    else:
        path = folder / "tokenizer.json"
        said = json.loads(path.read_text())
        ids = said["model"]["vocab"]
        ids["#"], ids["."] = ids["."], ids["#"]
        path.write_text(json.dumps(said))
    write_gguf(folder, folder / "model.gguf")
    with pytest.raises(UsageError, match=what):
        add(registry, folder, "other")
    with Registry(tmp_path / "elsewhere.db", create=True) as elsewhere:
        foreign = add(elsewhere, folder, "other")
    incumbent = registry.promoted()
    found = asyncio.run(compare(foreign, incumbent, world=WORLD, packs=8, seed=5, folder=tmp_path / "g"))
    assert not found.promoted and what in found.why and found.ours is None and found.theirs is not None


def test_weights_that_were_judged_are_not_judged_again(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="promoted already"):
        decided(registry, "embedded-base", tmp_path / "g")
    add(registry, registry.get("embedded-base").folder, "twin")
    with pytest.raises(UsageError, match="very weights of embedded-base"):
        decided(registry, "twin", tmp_path / "g")
    registry.reject("naive-base", "by hand")
    add(registry, registry.get("naive-base").folder, "naive-again")
    for name in ("naive-base", "naive-again"):
        with pytest.raises(UsageError, match="were rejected.*by hand"):
            decided(registry, name, tmp_path / "g")
    registry.promote("embedded", "by hand")
    with pytest.raises(UsageError, match="is retired"):
        decided(registry, "embedded-base", tmp_path / "g")
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"packs": 4}, "at least 8 packs"),
        ({"margin": 0.0}, "above 0"),
        ({"margin": math.inf}, "finite"),
        ({"pack_size": 0}, "at least 1"),
    ],
)
def test_what_could_decide_nothing_is_refused(
    registry: Registry, tmp_path: Path, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        decided(registry, "embedded", tmp_path / "g", **more)
    assert registry.get("embedded").state == "candidate"


# ---- trouble ----


def test_files_that_are_away_decide_nothing(registry: Registry, tmp_path: Path) -> None:
    """A disk that is not mounted is no fault of the weights, which could never be judged again."""
    folder = registry.get("embedded").folder
    for path in (folder, folder / "model.gguf"):
        path.rename(tmp_path / "away")
        with pytest.raises(Undecided, match="gone"):
            decided(registry, "embedded", tmp_path / "g", packs=8)
        (tmp_path / "away").rename(path)
    assert registry.get("embedded").state == "candidate" and not registry.verdicts()


def test_a_probe_of_other_weights_decides_nothing(registry: Registry, tmp_path: Path) -> None:
    shutil.copy(registry.get("naive-base").folder / "probe.json", registry.get("embedded").folder)
    with pytest.raises(Undecided, match=r"probe\.json is not of embedded"):
        decided(registry, "embedded", tmp_path / "g", packs=8)


def test_a_forged_probe_does_not_hide_what_would_serve(registry: Registry, tmp_path: Path) -> None:
    """The gate plays the GGUF file; a server loads the weights beside it, and is held against the probe."""
    folder, good = tmp_path / "forged", registry.get("embedded").folder
    shutil.copytree(registry.get("naive-base").folder, folder)
    shutil.copy(good / "model.gguf", folder)
    said = json.loads((good / "probe.json").read_text())
    (folder / "probe.json").write_text(json.dumps({**said, "digest": contents(folder).digest}))
    add(registry, folder, "forged")
    verdict = decided(registry, "forged", tmp_path / "g", packs=8)
    assert not verdict.promoted and "nats off what the weights beside it say" in verdict.said["why"]


def test_packs_that_were_trained_on_are_never_drawn(registry: Registry, tmp_path: Path) -> None:
    """A new registry counts from the same seed as another one, whose gate's lives may have been training data."""
    seen = registry.fresh_seed() + 1
    incumbent, other = registry.promoted(), registry.get("naive-base")
    asyncio.run(compare(other, incumbent, world=WORLD, packs=8, seed=seen, folder=tmp_path / "other"))
    registry.add(registry.get("embedded").folder, name="knows", data=[tmp_path / "other" / "candidate.db"])
    assert decided(registry, "knows", tmp_path / "g", packs=8).said["seed"] == seen + 1


def test_trouble_of_the_machine_decides_nothing(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gate_lives.live_all

    async def full(lanes: Any, *rest: Any) -> float:
        if lanes[0].agent == "candidate":
            raise StoreFull("candidate.db cannot be written: the disk is full")
        return await real(lanes, *rest)

    monkeypatch.setattr(gate_lives, "live_all", full)
    with pytest.raises(StoreFull):
        decided(registry, "embedded", tmp_path / "g", packs=8)
    assert registry.get("embedded").state == "candidate" and not registry.verdicts()
    seed = json.loads((tmp_path / "g" / "gate.json").read_text())["seed"]
    monkeypatch.undo()
    assert decided(registry, "embedded", tmp_path / "g", packs=8).said["seed"] == seed


def test_an_incumbent_that_is_damaged_decides_nothing(registry: Registry, tmp_path: Path) -> None:
    (registry.get("embedded-base").folder / "config.json").write_text("{}")
    with pytest.raises(Undecided, match="incumbent embedded-base"):
        decided(registry, "embedded", tmp_path / "g", packs=8)
    assert registry.get("embedded").state == "candidate"


def test_a_candidate_that_raises_is_rejected(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gate_lives.live_all

    async def odd(lanes: Any, *rest: Any) -> float:
        if lanes[0].agent == "candidate":
            raise KeyError("what nobody expects")
        return await real(lanes, *rest)

    monkeypatch.setattr(gate_lives, "live_all", odd)
    kept = decided(registry, "embedded", tmp_path / "g", packs=8)
    assert not kept.promoted and "what nobody expects" in kept.said["why"]


def test_another_promotion_meanwhile_decides_nothing(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gate.checks

    def meanwhile(*given: Any) -> Any:
        registry.promote("naive-base", "by hand")
        return real(*given)

    monkeypatch.setattr(gate, "checks", meanwhile)
    with pytest.raises(Undecided, match="meanwhile naive-base"):
        decided(registry, "embedded", tmp_path / "g", packs=8)
    assert registry.get("embedded").state == "candidate" and not registry.verdicts()


def test_a_folder_belongs_to_one_verdict(registry: Registry, tmp_path: Path) -> None:
    incumbent, candidate = registry.promoted(), registry.get("naive-base")
    asyncio.run(compare(candidate, incumbent, world=WORLD, packs=8, seed=5, folder=tmp_path / "g"))
    for other in ({"packs": 9}, {"seed": 6}, {"margin": 0.2}):
        given = {"packs": 8, "seed": 5, "margin": 0.1, **other}
        with pytest.raises(UsageError, match="was begun with"):
            asyncio.run(compare(candidate, incumbent, world=WORLD, folder=tmp_path / "g", **given))
    with pytest.raises(UsageError, match="was begun with candidate naive-base"):
        decided(registry, "embedded", tmp_path / "g", packs=8)


# ---- model servers ----


def bare(registry: Registry, tmp_path: Path, policy: str) -> Checkpoint:
    """A checkpoint without a GGUF file."""
    folder = tmp_path / f"bare-{policy}"
    shutil.copytree(folder_of(policy), folder, ignore=shutil.ignore_patterns("CARD.md", "model.gguf"))
    return add(registry, folder, f"bare-{policy}")


@pytest.mark.slow
def test_without_a_gguf_file_model_servers_answer(registry: Registry, tmp_path: Path) -> None:
    bare(registry, tmp_path, "embedded")
    kept = decided(registry, "bare-embedded", tmp_path / "g", packs=12, margin=WIDE)
    assert kept.promoted and kept.said["engine"] == "embedded"
    with sqlite3.connect(tmp_path / "g" / "candidate.db") as conn:
        (weights,) = [row[0] for row in conn.execute("SELECT DISTINCT weights FROM calls")]
    assert weights.startswith(registry.get("bare-embedded").weights)


@pytest.mark.slow
def test_a_server_that_was_killed_decides_nothing(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare(registry, tmp_path, "embedded")
    real, started = ModelServer.start, []

    async def start(checkpoint: Checkpoint, *rest: Any, **more: Any) -> ModelServer:
        server = await real(checkpoint, *rest, **more)
        started.append(server)
        return server

    def kill(lane: Any, pack: int, outcome: Any) -> None:
        if lane.agent == "candidate" and started[-1].ended is None:
            os.killpg(started[-1]._process.pid, signal.SIGKILL)

    monkeypatch.setattr(ModelServer, "start", start)
    monkeypatch.setitem(OpenAIModel.__init__.__kwdefaults__, "retries", 0)
    with pytest.raises(Undecided, match="was killed"):
        decided(registry, "bare-embedded", tmp_path / "g", packs=8, watch=Watch(outcome=kill))
    assert registry.get("bare-embedded").state == "candidate"


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_decides_the_same(registry: Registry, tmp_path: Path) -> None:
    kept = decided(registry, "embedded", tmp_path / "g", packs=12, margin=WIDE, engine=Engine("vllm"))
    assert kept.promoted and kept.said["engine"] == "vllm"
    assert not kept.said["played"]["candidate"]["inexact"]


# ---- the commands ----


def said(app: Any, *words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_promote_and_rollback_say_what_happened(registry: Registry, tmp_path: Path) -> None:
    common = ("--registry", registry.path, "--packs", 16, "--out", tmp_path / "gates")
    up = said(promote_command.app, "embedded", *common, "--margin", WIDE)
    assert up.exit_code == 0, up.output
    assert "embedded is promoted" in up.output and "holds  better" in up.output and "difference" in up.output
    down = said(promote_command.app, "naive-base", *common, "--json")
    assert down.exit_code == promote_command.REJECTED
    found = json.loads(down.stdout)
    assert not found["promoted"] and found["folder"].endswith("naive-base-against-embedded")
    back = said(rollback_command.app, "--registry", registry.path, "--why", "it got rude")
    assert back.exit_code == 0 and back.output.startswith("embedded-base@") and "it got rude" in back.output
    with pytest.raises(UsageError, match="nothing to go back to"):
        raise said(rollback_command.app, "--registry", registry.path).exception


def test_names_nobody_knows_have_a_suggestion(registry: Registry, tmp_path: Path) -> None:
    for words, near in (
        (("embeded",), "embedded"),
        (("embedded", "--engine", "vlm"), "vllm"),
        (("embedded", "--world", "frozen-lak"), "frozen-lake"),
    ):
        error = said(promote_command.app, *words, "--registry", registry.path, "--out", tmp_path / "gates").exception
        assert isinstance(error, UnknownName) and near in str(error)


@pytest.mark.slow
def test_a_gate_that_was_killed_goes_on(registry: Registry, tmp_path: Path) -> None:
    out = tmp_path / "gates" / "embedded-against-embedded-base"
    command = [sys.executable, "-m", "cod_agent.cli", "promote", "embedded", "--registry", str(registry.path)]
    command += ["--packs", "96", "--out", str(tmp_path / "gates"), "--json"]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while time.monotonic() < until and lives(out / "incumbent.db") < 20:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert (before := lives(out / "incumbent.db")) >= 20 and not registry.verdicts()
    seed = json.loads((out / "gate.json").read_text())["seed"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    (kept,) = registry.verdicts()
    assert kept.promoted and kept.said["seed"] == seed
    assert before < lives(out / "incumbent.db") == lives(out / "candidate.db") == 96 * 4


def lives(file: Path) -> int:
    """Tasks that are over."""
    if not file.is_file():
        return 0
    try:
        with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as conn:
            return int(conn.execute("SELECT count(*) FROM tasks WHERE state != 'open'").fetchone()[0])
    except sqlite3.Error:  # being made
        return 0
