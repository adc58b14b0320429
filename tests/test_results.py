"""The pages of docs/results say what the stored runs say, and the experiments behind them run."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("verl")
pytest.importorskip("matplotlib")
HOME = Path(__file__).parent.parent
RESULTS = HOME / "docs" / "results"
PAGES = sorted(RESULTS.glob("*.md"))


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(HOME / "experiments"))
    import lab

    yield lab
    for name in ("lab", "pages", "figures", "stories", *lab.EXPERIMENTS):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_the_tables_of_its_data(page: Path, lab: Any) -> None:
    import pages

    assert pages.written(page.read_text()) == page.read_text(), "run python experiments/pages.py"


def test_every_experiment_is_told_with_its_command_and_its_figure(lab: Any) -> None:
    for name in lab.EXPERIMENTS:
        told, about = (RESULTS / f"{name}.md").read_text(), lab.load(name)["about"]
        assert about["command"].startswith(f"python experiments/{name}.py") and f"`{about['command']}`" in told
        assert (HOME / "docs" / "images" / f"results-{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"results-{name}.png" in told and about["minutes"] > 0


def test_a_page_that_differs_from_its_data_is_found_out(lab: Any) -> None:
    import pages

    told = (RESULTS / "ablation.md").read_text()
    wrong = re.sub(r"(<!-- ablation arms -->\n(?:.*\n){2}\| [^|]*\|) [^|]*\|", r"\1 99.0 |", told)
    assert wrong != told and pages.written(wrong) == told


def test_stored_measurements_are_whole(lab: Any) -> None:
    learning = lab.load("learning")
    measured = [*learning["starts"].values(), *(run["measured"] for run in learning["runs"])]
    for one in measured:
        for words in one["outcomes"].values():
            assert lab.rewards(words).shape == (learning["packs"], 4) and np.isfinite(lab.rewards(words)).all()
    assert {(run["base"], run["seed"]) for run in learning["runs"]} == {
        (base, seed) for base in learning["ways"] for seed in range(learning["seeds"])
    }
    ablation = lab.load("ablation")
    assert all(len(run["curve"]["reward"]) == ablation["steps"] for run in ablation["runs"])


def test_the_policies_of_three_worlds_were_measured_in_all_of_them(lab: Any) -> None:
    found = lab.load("mixed")
    assert len(found["worlds"]) == 3 and len({run["arm"] for run in found["runs"]}) == 4
    for lived in [found["players"], *found["starts"].values(), *(run["measured"] for run in found["runs"])]:
        for world in found["worlds"]:
            for words in lived[world].values():
                table = lab.rewards(words)
                assert (
                    table.shape == (found["packs"], 4)
                    and np.isfinite(table).all()
                    and 0 <= table.min() <= table.max() <= 1
                )


def test_rewards_are_kept_as_words_and_come_back(lab: Any) -> None:
    assert lab.spelt_rewards([[0, 1, np.nan], [1, 1, 0]]) == "01- 110"
    assert lab.spelt_rewards([[0.987, 0], [np.nan, 1]]) == "99/0 -/100"
    for words in ("01- 110", "99/0 -/100", "0/33 5/100"):
        assert lab.spelt_rewards(lab.rewards(words)) == words


def test_steps_to_a_level_and_intervals_over_seeds(lab: Any) -> None:
    import ablation

    assert ablation.reached([0.0] * 5 + [1.0] * 5, 0.75) == 9  # the first five of which four are 1
    assert np.isnan(ablation.reached([0.5] * 9, 0.75))
    made = lab.over_seeds([0.1, 0.2, 0.3])
    assert made["mean"] == 0.2 and made["high"] - 0.2 == pytest.approx(4.303 * 0.1 / 3**0.5, abs=1e-4)
    assert lab.over_seeds([0.5])["low"] is None
    assert lab.spelt(0.5, 0.25, 1.0) == ".50 [.25, 1.00]" and lab.spelt(-0.02, None, None) == "-.02"


@pytest.mark.slow
def test_an_experiment_trains_and_measures_and_does_nothing_twice(lab: Any, tmp_path: Path) -> None:
    words = (
        "--env",
        "frozen-lake:tiny",
        "--base",
        "embedded-base",
        "--steps",
        2,
        "--packs",
        2,
        "--group",
        4,
        "--save-every",
        1,
    )
    trained = lab.train(tmp_path / "trained", *words)
    curve = trained.json()
    assert len(curve["reward"]) == 2 and all(tokens > 0 for tokens in curve["trained_tokens"])
    assert (trained.at(1) / "model.gguf").read_bytes() != (trained.model / "model.gguf").read_bytes()
    first = lab.evaluate(tmp_path / "eval", trained.model, "--packs", 3, "--controls", "none", world="frozen-lake:tiny")
    assert lab.rewards(first["outcomes"]["with context"]).shape == (3, 4)
    file = tmp_path / "eval" / "runs.db"
    before = file.stat().st_mtime_ns
    assert lab.evaluate(tmp_path / "eval", trained.model, world="frozen-lake:tiny") == first
    assert file.stat().st_mtime_ns == before and len(lab.train(tmp_path / "trained", *words).steps) == 2


@pytest.mark.slow
def test_agents_are_recorded_on_packs_that_no_measurement_has(lab: Any, tmp_path: Path) -> None:
    file = lab.live(tmp_path / "a.db", "frozen-lake:tiny", "embedded-base", "--packs", 2)
    assert lab.outcomes(file, "agent").count(" ") == 1
    from cod_agent.memory.readonly import look

    with look(file) as conn:
        assert all("/train/" in name for (name,) in conn.execute("SELECT name FROM runs"))


def test_a_command_that_fails_says_its_last_words(lab: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no-such-world"):
        lab.evaluate(tmp_path / "eval", "embedded", world="no-such-world")
    assert not (tmp_path / "eval" / "eval.done").exists()
