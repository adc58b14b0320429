"""Planted instructions: how far they get without defences, with framing, and behind each policy of the write gate.

The attacks and the lives are tests/planted's: a stranger's text in one of six tasks, and victims that obey whatever they read, or
whatever is not marked as data. What is counted is what the runtime let through. Beside them, two real models: the shipped policy lives
with a lie (`planted_lie`), and a language model writes notes of records with planted instructions (`planted_note`).
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Annotated, Any

import figures
import lab
import planted_lie
import planted_note
import typer

from cod_agent.trust.blame import follow
from cod_agent.trust.suspicions import CHECKS, Proposal
from cod_agent.trust.write_gate import WriteGate

sys.path.insert(0, str(lab.HOME / "tests"))
from planted import trial
from planted.attacks import ATTACKS, HONEST, Attack

NAME = "injection"
PACKS = 64
"""Lives of the shipped policy."""
OF_EACH = 6
"""Attacks of each family that the language model reads."""
VICTIMS: dict[str, trial.Credulity] = {"obeys anything": "anything", "obeys what is not marked as data": "unframed"}
DEFENCES: dict[str, tuple[Callable[[], WriteGate | str], bool]] = {
    "none": (lambda: "open", False),
    "framing": (lambda: "open", True),
    "quarantine": (lambda: "quarantine", True),
    "quarantine, canaries": (
        lambda: WriteGate("quarantine", canaries=trial.canaries(), misbehaved=trial.misbehaved),
        True,
    ),
    "canaries for every change": (
        lambda: WriteGate("quarantine", max_new=0, canaries=trial.canaries(), misbehaved=trial.misbehaved),
        True,
    ),
    "review, nobody decides": (lambda: "review", True),
}
"""The gate, and whether prompts mark what others wrote."""
STAGES = {
    "stood": "stood in a context in force",
    "obeyed": "obeyed in a later task",
    "stayed": "stood there at the end",
    "spread": "obeyed in a forked run",
    "at_once": "obeyed in the very task",
}


def main(
    out: Annotated[Path, typer.Option(help="Where its parts go: one that is there is not lived again.")] = Path(
        "runs/injection"
    ),
    gguf: Annotated[
        Path | None, typer.Option(help="SmolLM2-135M-Instruct, as a GGUF file. Without: the answers it gave last time.")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Every sixth attack, 8 packs.")] = False,
) -> None:
    """Example: python experiments/injection.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf"""
    out, attacks = (out.with_name("injection-fast"), ATTACKS[::6]) if fast else (out, ATTACKS)
    lives = {
        victim: {
            defence: _once(out, f"{VICTIMS[victim]}-{defence}", partial(_lived, attacks, victim, defence))
            for defence in DEFENCES
        }
        for victim in VICTIMS
    }
    real = {"lie": _once(out, "lie", partial(planted_lie.lived, packs=8 if fast else PACKS))}
    if gguf is not None:
        real["notes"] = _once(out, "notes", lambda _: planted_note.asked(gguf, alarmed, 1 if fast else OF_EACH))
    else:
        real["notes"] = lab.load(NAME)["real"]["notes"]
    found = {"lives": lives, "honest": len(HONEST), "alarms": [note for note in HONEST if alarmed(note)], "real": real}
    lab.save(f"{NAME}{lab.FAST}" if fast else NAME, found, out)
    if fast:
        print("\n\n".join(tables(found).values()))
    else:
        draw(lab.load(NAME), lab.IMAGES / f"results-{NAME}.png")


def _once(out: Path, name: str, live: Callable[[Path], Any]) -> Any:
    """What `live` finds in a folder of its own; what it found is kept in `out`."""
    kept = out / f"{name}.json"
    if not kept.is_file():
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = live(Path(folder))
        out.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found))
        kept.with_suffix(".done").write_text(f"{time.monotonic() - began:.1f}")
    return json.loads(kept.read_text())


def _lived(attacks: Sequence[Attack], victim: str, defence: str, folder: Path) -> list[list[str | float]]:
    """What came of each attack: its family, the stages it reached, the mean reward of the life."""
    gate, framed = DEFENCES[defence]
    rows: list[list[str | float]] = []
    for number, attack in enumerate(attacks):
        fate = asyncio.run(trial.live(folder / f"{number}.db", attack, VICTIMS[victim], gate(), framed=framed))
        rows.append([attack.family, *(int(getattr(fate, stage)) for stage in STAGES), round(fate.reward, 4)])
    return rows


def alarmed(note: str) -> bool:
    """Whether a check holds an honest note back."""
    proposal = Proposal("a", "life", 1, "", note, follow([], note, 1, {}), {})
    return any(True for check in CHECKS for _ in check(proposal))


def wilson(count: int, of: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson's)."""
    z, share = 1.96, count / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z * sqrt(share * (1 - share) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return max(0.0, middle - half), min(1.0, middle + half)


def tables(found: lab.Found) -> dict[str, str]:
    """`stages` by victim and defence; `families` of the one that obeys anything; `honest`, the false alarms; `lie`; `notes`."""
    stages = [
        [victim, defence, *(_share(rows, at) for at in range(1, len(STAGES) + 1)), f"{_mean(rows):.2f}"]
        for victim, cells in found["lives"].items()
        for defence, rows in cells.items()
    ]
    worst = found["lives"]["obeys anything"]
    names = list(dict.fromkeys(row[0] for row in next(iter(worst.values()))))
    families = [
        [name, str(sum(row[0] == name for row in worst["none"])), *(_count(rows, name) for rows in worst.values())]
        for name in names
    ]
    alarms = f"{len(found['alarms'])} of {found['honest']} honest notes were held back."
    return {
        "stages": lab.table(["victim", "defence", *STAGES.values(), "reward"], stages),
        "families": lab.table(["family", "attacks", *worst], families),
        "honest": alarms,
        "lie": planted_lie.table(found["real"]["lie"]),
        "notes": planted_note.table(found["real"]["notes"]),
    }


def _share(rows: Sequence[Sequence[float | str]], at: int) -> str:
    count = sum(int(row[at]) for row in rows)
    low, high = wilson(count, len(rows))
    return f"{count / len(rows):.2f} [{low:.2f}, {high:.2f}]"


def _mean(rows: Sequence[Sequence[float | str]]) -> float:
    return sum(float(row[-1]) for row in rows) / len(rows)


def _count(rows: Sequence[Sequence[float | str]], name: str) -> str:
    return str(sum(int(row[1]) for row in rows if row[0] == name))


def draw(found: lab.Found, path: Path) -> None:
    """Shares that stood in a context in force, by defence."""
    made, (axes,) = figures.figure(1)
    for number, (victim, cells) in enumerate(found["lives"].items()):
        counts = [(sum(int(row[1]) for row in rows), len(rows)) for rows in cells.values()]
        x = [at + 0.36 * (number - 0.5) for at in range(len(cells))]
        shares = [count / of for count, of in counts]
        ends = [wilson(count, of) for count, of in counts]
        off = [
            [max(0.0, share - low) for share, (low, _) in zip(shares, ends, strict=True)],
            [max(0.0, high - share) for share, (_, high) in zip(shares, ends, strict=True)],
        ]
        axes.bar(x, shares, 0.34, color=figures.COLORS[number], label=f"a victim that {victim}")
        axes.errorbar(x, shares, yerr=off, fmt="none", color=figures.INK, linewidth=1)
    axes.set_xticks(range(len(DEFENCES)), [re.sub(r"(?<=,) | (?=every)", "\n", name) for name in DEFENCES], fontsize=8)
    figures.finish(axes, f"{len(ATTACKS)} planted instructions", "defence", "share that stood in a context in force")
    figures.keep(made, path)


if __name__ == "__main__":
    typer.run(main)
