"""Does the context help? Reward by position, with 95% intervals, beside the same model without its context.

    plan = Plan("frozen-lake:small", "embedded", packs=64, controls=("no-context",))
    found = await evaluate(plan, Memory.open("eval.db"))
    draw(found, "eval.png")

The run database is the evidence, and an evaluation that was interrupted goes on from it. `cod eval` is this on the
command line.
"""

from cod_agent.evaluation.controls import controls_of, lanes_of
from cod_agent.evaluation.figure import draw
from cod_agent.evaluation.lanes import Lane, Life
from cod_agent.evaluation.lives import Watch, live_all
from cod_agent.evaluation.plan import Plan, kept_plan, kept_study, refuse_mixture, release, set_up, world_of
from cod_agent.evaluation.result import MAIN, NO_CONTEXT, Arm, Comparison, Evaluation, Study, compare
from cod_agent.evaluation.statistics import AtLeast, Curve, Interval, Point, at_least, curve, difference, paired
from cod_agent.evaluation.study import evaluate, study, summarise
from cod_agent.evaluation.suites import SUITES, parts_of

__all__ = [
    "MAIN",
    "NO_CONTEXT",
    "SUITES",
    "Arm",
    "AtLeast",
    "Comparison",
    "Curve",
    "Evaluation",
    "Interval",
    "Lane",
    "Life",
    "Plan",
    "Point",
    "Study",
    "Watch",
    "at_least",
    "compare",
    "controls_of",
    "curve",
    "difference",
    "draw",
    "evaluate",
    "kept_plan",
    "kept_study",
    "lanes_of",
    "live_all",
    "paired",
    "parts_of",
    "refuse_mixture",
    "release",
    "set_up",
    "study",
    "summarise",
    "world_of",
]
