"""What the agent of PDE discovery is told, in both forms."""

from __future__ import annotations

from collections.abc import Sequence

from cod_agent.environments.base import MALFORMED, Form
from cod_agent.environments.pde_discovery.equations import decimals, written
from cod_agent.environments.pde_discovery.packs import Preset
from cod_agent.environments.pde_discovery.reaction import Start
from cod_agent.environments.pde_discovery.regression import Candidate

_RULES = """\
A quantity u(x, t) on a rod follows

    du/dt = d2u/dx2 + f(u),    0 <= x <= 1, 0 <= t <= 1, u = 0 at both ends.

Your task is to find the reaction f. It is a sum of at most {most} of these terms, each with a coefficient between 0.5 and 2 in \
magnitude, of either sign, with two decimals:

    {terms}

f is the same for all tasks of this series. Each task starts from another profile u(x, 0), which is told. You may sample {points} points \
(x, t) in a task, x from 0.01 to 0.99 and t from 0.01 to 1, both in hundredths. Of each you are told u and the response f(u), both with \
noise (standard deviation {noise} and {quarter}). Diffusion flattens u quickly, so late points tell little; high and low values of u, and \
both signs, tell the terms apart.

Each turn you answer with exactly one action between answer tags. You have {steps} turns:

<answer>sample x=0.3 t=0.01; x=0.5 t=0.02</answer> samples points.
<answer>summarise</answer> lists the evidence.{recall}
<answer>regress</answer> fits all equations of few terms to the evidence and shows the best of each number of terms; \
<answer>regress 1</answer> those of at most so many terms; <answer>regress u, u^3 | u</answer> just the candidates you name, up to 8.
<answer>finalise 1.25*u - 0.8*u^3</answer> ends the task with that equation, which must be one that the latest regression showed, its \
coefficients copied or rounded to two decimals; the reward is that of the numbers you write.

{lasting} What cannot be done costs the turn; an answer that is none of these ends the task with reward 0, and so does running out \
of turns.

The reward is 1 / (1 + e): e is the sum of the errors of all coefficients, divided by the sum of the true magnitudes, plus 1 for \
each term more than f has. With enough points, an equation of more terms always fits a little better: prefer the fewest that leave no \
more than noise."""

_RECALL = """
<answer>recall u=0.81 r=-0.22; u=-0.4 r=0.1</answer> puts points into evidence, u and response, that you noted in earlier tasks."""
_REMEMBERS = "What you sampled stays in evidence in later tasks."
_FORGETS = "The evidence is empty again with every task, so what you write down of points, terms and coefficients helps in later tasks."

_ENDS = {
    "finalised": "You finalised an equation",
    "steps": "You ran out of turns with nothing finalised",
    MALFORMED: "The answer was malformed: exactly one action between answer tags was expected",
}


def rules(preset: Preset) -> str:
    """All that holds for every task, for the natural form."""
    return _RULES.format(
        most=preset.most,
        terms=", ".join(preset.terms),
        points=preset.points,
        steps=preset.steps,
        noise=preset.noise,
        quarter=preset.noise / 4,
        recall="" if preset.remembers else _RECALL,
        lasting=_REMEMBERS if preset.remembers else _FORGETS,
    )


def start(form: Form, modes: Start, noise: float) -> str:
    """The profile a task starts from."""
    if form == "compact":
        return f"u0 {' '.join(f'{decimals(amplitude)} {mode}' for amplitude, mode in modes)} noise {noise:g}"
    waves = [f"{decimals(amplitude)}*sin({'' if mode == 1 else f'{mode}*'}pi*x)" for amplitude, mode in modes]
    return f"The profile at t = 0: u(x, 0) = {' + '.join(waves).replace('+ -', '- ')}."


def left(form: Form, points: int, steps: int, evidence: int) -> str:
    """What may still be done, and on how much evidence."""
    if form == "compact":
        return f"points {points} steps {steps} evidence {evidence}"
    return f"Points left to sample: {points}. Turns left: {steps}. Points in evidence: {evidence}."


def counted(number: int) -> str:
    """`1 point`, `3 points`."""
    return f"{number} point{'' if number == 1 else 's'}"


def points(form: Form, seen: Sequence[tuple[float, float]], at: Sequence[tuple[float, float]] = ()) -> str:
    """u and response of points, one a line; in the natural form with their (x, t), where they were just sampled."""
    if form == "compact":
        return "\n".join(f"{u:.4f} {response:.4f}" for u, response in seen)
    places = [f"x = {x:.2f}, t = {t:.2f}: " for x, t in at] or [""] * len(seen)
    told = (f"{place}u = {u:.4f}, response = {r:.4f}" for place, (u, r) in zip(places, seen, strict=True))
    return "\n".join(told)


def fits(form: Form, found: Sequence[Candidate], count: int) -> str:
    """The candidates of a regression on so many points; in the natural form with how well these tell them apart."""
    if form == "compact":
        return "\n".join(f"{one.error:.4f} {written(one.equation)}" for one in found)
    lines = [f"Regression on {counted(count)}. The error is the largest over all of them."]
    for size in sorted({len(one.equation) for one in found}):
        some = [one for one in found if len(one.equation) == size]
        lines.append(f"With {size} term{'s' if size > 1 else ''}:")
        if some[1:]:
            margin = some[1].error / max(some[0].error, 1e-4)
            lines[-1] = f"{lines[-1][:-1]} (the second leaves {margin:.1f} times the error of the first):"
        lines += [f"  {written(one.equation)}   error {one.error:.4f}, condition {one.condition:.2g}" for one in some]
    return "\n".join(lines)


def ending(form: Form, how: str, why: str, final: Candidate | None, latest: Candidate | None) -> str:
    """The feedback: how it ended, what was finalised, and the best of the latest regression."""
    if form == "compact":
        said, shown = f"invalid: {why}" if how == MALFORMED else how, final or latest
        gap = "; " if why else " "
        return f"{said}{gap}{shown.error:.4f} {written(shown.equation)}" if shown else said
    said = f"{_ENDS[how]}: {why}." if why else f"{_ENDS[how]}."
    for name, one in (("Final", final), ("Best of the latest regression", latest)):
        if one:
            said += f" {name}: f(u) = {written(one.equation)}, largest error {one.error:.4f}."
    return said
