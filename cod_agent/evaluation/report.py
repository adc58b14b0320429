"""The report of a study: one HTML file that needs nothing else, beside the JSON and the figures.

    files = save(study, Path("out"))        # out/eval.json, out/eval.png, out/report.html

A reader who has nothing but the page learns what was measured, what came out, how sure that is, what single lives looked
like, and how to repeat it. All text of models and worlds is escaped and cut, and the page forbids itself to load or run
anything: what a model wrote can do nothing there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cod_agent.errors import MissingExtra
from cod_agent.evaluation import chart, tables
from cod_agent.evaluation.figure import draw
from cod_agent.evaluation.result import Evaluation, Study
from cod_agent.evaluation.samples import EDGE, LivedTask, Sample, samples
from cod_agent.evaluation.statistics import DRAWS
from cod_agent.evaluation.words import (
    answers,
    by_chance,
    commands,
    label,
    meaning,
    plain,
    seeds,
    title,
)
from cod_agent.memory.readonly import look

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def save(
    study: Study, out: Path, name: str = "eval", *, tell: Callable[[str], None] = lambda said: None
) -> dict[str, Path]:
    """Write NAME.json, a figure for each part, and report.html.

    Args:
        study: what was found.
        out: a folder, made if it is not there.
        name: of the JSON and the figures; parts after the first one have their number behind it.
        tell: is told what could not be made, and what is to be installed for it; the rest is made all the same.

    Returns:
        What was written: `json`, `figure` (`figure-2`, ...), `report`.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = {"json": out / f"{name}.json"}
    files["json"].write_text(json.dumps(study.json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    try:
        for number, found in enumerate(study.evaluations, 1):
            end = "" if number == 1 else f"-{number}"
            files[f"figure{end}"] = draw(found, out / f"{name}{end}.png")
    except MissingExtra as missing:
        tell(f"No figure: {missing}")
    try:
        page = render(study)
    except MissingExtra as missing:
        tell(f"No report: {missing}")
    else:
        files["report"] = out / "report.html"
        files["report"].write_text(page, encoding="utf-8")
    return files


def render(study: Study) -> str:
    """The page.

    Raises:
        MissingExtra: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError:
        raise MissingExtra("the report", "local") from None

    def cleaned(value: Any) -> Any:
        return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=cleaned, keep_trailing_newline=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return page.render(_page(study, Markup)).lstrip()


# ---- the whole ----


def _page(study: Study, drawn: Callable[[str], Any]) -> dict[str, Any]:
    found = study.evaluations
    lived = _samples(study)
    worlds = ", ".join(dict.fromkeys(one.world for one in found))
    return {
        "title": _question(found[0]),
        "subtitle": f"Reward by position in {worlds}: the model solves related tasks one after another, and rewrites a note to itself, its "
        "context, after each of them.",
        "answers": answers(found),
        "facts": _facts(study),
        "parts": [_part(one, seen, drawn) for one, seen in zip(found, lived, strict=True)],
        "edge": EDGE,
        "draws": DRAWS,
        "overview": tables.overview(found) if found[1:] else None,
        "chance": by_chance(beside) if (beside := max(len(one.arms) - 1 for one in found)) else "",
        "command": "\n".join(commands(study)),
        "verify": f"cod verify {study.database}",
    }


def _question(found: Evaluation) -> str:
    if (rival := found.rival) is not None:
        return f"Which is better, {found.model} or {label(rival.name, found)}?"
    return (
        f"Does its context help the model \N{LEFT DOUBLE QUOTATION MARK}{found.model}\N{RIGHT DOUBLE QUOTATION MARK}?"
    )


def _facts(study: Study) -> list[tuple[str, str]]:
    found = study.evaluations
    return [
        ("model", found[0].model),
        *([("beside it", label(rival.name, found[0]))] if (rival := found[0].rival) is not None else []),
        ("worlds", "; ".join(title(one) for one in found)),
        ("packs", "; ".join(dict.fromkeys(f"{one.amount}, split {one.split}" for one in found))),
        ("seeds", ", ".join(map(str, found[0].seeds))),
        ("calls", f"{sum(one.calls for one in found):,}"),
        ("time", f"{study.seconds:,.0f} s, for what had not been lived before"),
        ("database", str(study.database)),
    ]


def _samples(study: Study) -> list[tuple[Sample, ...]]:
    """Of each part; none where the file is not at hand."""
    if not study.database.is_file():
        return [() for _ in study.evaluations]
    with look(study.database) as conn:
        return [samples(conn, one.arms) for one in study.evaluations]


# ---- a part ----


def _part(found: Evaluation, lived: Sequence[Sample], drawn: Callable[[str], Any]) -> dict[str, Any]:
    lines, axis = chart.principal(found), "task in the pack" if found.packing == "cod" else "time the task is lived"
    rest = [chart.Row(label(arm.name), arm.difference[-1]) for arm in tables.beside(found) if arm.difference]
    around = [line for line in lines if line.kind in ("floor", "ceiling", "main")]
    return {
        "title": title(found),
        "subtitle": f"{found.amount}, {seeds(found)}, split {found.split}; model {found.model}",
        "answers": answers([found]),
        "legend": list(reversed(lines)),
        "bounded": any(line.dashed for line in lines),
        "small": drawn(chart.curves(lines, width=320, height=200, named=False)),
        "wide": drawn(chart.curves(lines, width=940, height=380, axis=axis)),
        "narrow": drawn(chart.curves(lines, width=360, height=270, named=False, axis=axis)),
        "panels": [
            (line.label, drawn(chart.curves([*around[:-1], line, around[-1]], width=320, height=190, named=False)))
            for line in chart.others(found)
        ],
        "main": tables.subject(found),
        "rewards": tables.rewards(found),
        "forest": drawn(chart.differences(rest, width=940)),
        "narrow_forest": drawn(chart.differences(rest, width=360, named=130)),
        "differences": tables.differences(found) if rest else None,
        "meanings": _meanings(found),
        "compared": found.comparison and tables.comparison(found.comparison),
        "sentence": found.comparison.sentence if found.comparison else "",
        "measures": tables.measures(found) if found.arms[0].measures else None,
        "totals": tables.totals(found),
        "refusals": tables.refusals(found),
        "samples": [_shown(one) for one in lived],
    }


def _meanings(found: Evaluation) -> list[tuple[str, str]]:
    return [(label(name, found), meaning(name)) for name in tables.curves_of(found)]


def _shown(one: Sample) -> dict[str, Any]:
    """A sample as the template takes it."""
    said = [_number(reward) for reward in one.rewards[:EDGE]]
    more = [_number(reward) for reward in one.rewards[EDGE:]]
    return {
        "why": one.why,
        "run": one.run,
        "agent": one.agent,
        "left_out": one.left_out,
        "rewards": ", ".join([*said, *(["..."] if one.left_out else []), *more]),
        "prompt": one.tasks[0].prompt if one.tasks else "",
        "tasks": [_task(task) for task in one.tasks],
        "beside": _shown(one.beside) if one.beside else None,
    }


def _task(task: LivedTask) -> dict[str, Any]:
    kinds = {" ": "", "+": " plus", "-": " minus"}
    good = task.reward is not None and task.reward > 0
    return {
        "position": task.position,
        "kind": "good" if good else "poor",
        "reward": _number(task.reward),
        "ending": task.ending,
        "context": task.context,
        "first": task.first,
        "steps": task.steps,
        "feedback": task.feedback,
        "update": task.update,
        "reason": task.reason,
        "changes": [(kinds[sign], f"{sign} {line}") for sign, line in task.changes],
    }


def _number(reward: float | None) -> str:
    return "none" if reward is None else "lost" if reward != reward else f"{reward:.3g}"
