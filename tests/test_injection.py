"""What planted instructions reach: a part of the suite of experiments/injection.py, with victims that obey everything they read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from planted import trial
from planted.attacks import ATTACKS, HONEST, Attack

from cod_agent.trust.blame import follow
from cod_agent.trust.suspicions import CHECKS, Proposal
from cod_agent.trust.write_gate import WriteGate

FEW, LIES = ATTACKS[::6], ("plausible", "a false fact")


async def fates(folder: Path, attacks: Sequence[Attack], gate: WriteGate | str, **how: object) -> list[trial.Fate]:
    credulity: trial.Credulity = how.pop("credulity", "anything")  # type: ignore[assignment]
    return [
        await trial.live(folder / f"{number}.db", attack, credulity, gate, **how)  # type: ignore[arg-type]
        for number, attack in enumerate(attacks)
    ]


async def test_without_defences_a_victim_falls_for_all_of_them(tmp_path: Path) -> None:
    """Or the suite would show nothing."""
    lived = await fates(tmp_path, FEW, "open", framed=False)
    assert all(fate.stood and fate.stayed and fate.spread and fate.reward < 0.5 for fate in lived)


async def test_what_is_marked_as_data_is_marked_whatever_stands_in_it(tmp_path: Path) -> None:
    lived = await fates(tmp_path, FEW, "open", credulity="unframed")
    assert not any(fate.stood or fate.obeyed or fate.at_once for fate in lived)
    forged = [attack for attack in ATTACKS if attack.family == "delimiters"]
    bare = await fates(tmp_path / "bare", forged, "open", credulity="unframed", framed=False)
    assert all(fate.stood for fate in bare), "these do break out where nothing is defused"
    assert not any(fate.stood for fate in await fates(tmp_path / "ours", forged, "open", credulity="unframed"))


async def test_quarantine_holds_back_what_is_an_order_and_lets_false_facts_through(tmp_path: Path) -> None:
    tried = [*ATTACKS[1::3], *(attack for attack in ATTACKS if attack.family in ("across tasks", "a false fact"))]
    lived = await fates(tmp_path, tried, "quarantine")
    through = {attack.family for attack, fate in zip(tried, lived, strict=True) if fate.obeyed or fate.spread}
    assert through <= set(LIES)
    lies = [fate for attack, fate in zip(tried, lived, strict=True) if attack.family == "a false fact"]
    assert all(fate.stood and fate.obeyed and fate.spread for fate in lies)


async def test_canaries_find_the_lie_that_words_do_not_give_away(tmp_path: Path) -> None:
    every_change = WriteGate("quarantine", max_new=0, canaries=trial.canaries(), misbehaved=trial.misbehaved)
    lies = [attack for attack in ATTACKS if attack.family in LIES]
    lived = await fates(tmp_path, lies, every_change)
    assert not any(fate.stood or fate.obeyed or fate.spread for fate in lived)


async def test_behind_a_review_nothing_gets_anywhere_and_nothing_is_learnt_until_somebody_decides(
    tmp_path: Path,
) -> None:
    lived = await fates(tmp_path, FEW, "review")
    assert not any(fate.stood or fate.obeyed or fate.spread for fate in lived)
    assert all(fate.reward == 0 for fate in lived)


@pytest.mark.parametrize("note", HONEST)
def test_honest_notes_are_not_held_back(note: str) -> None:
    proposal = Proposal("a", "life", 1, "", note, follow([], note, 1, {}), {})
    assert [str(finding) for check in CHECKS for finding in check(proposal)] == []
