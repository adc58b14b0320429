"""Does the context help? Reward by position, with 95% intervals, beside the same model without its context.

    plan = Plan("frozen-lake:small", "embedded", packs=64, controls=("no-context",))
    found = await evaluate(plan, Memory.open("eval.db"))
    draw(found, "eval.png")

The run database is the evidence, and an evaluation that was interrupted goes on from it. `cod eval` is this on the
command line.
"""

from cod_agent.evaluation.figure import draw
from cod_agent.evaluation.lives import Lane, Watch, lanes_of, live_all
from cod_agent.evaluation.plan import Plan, kept_plan, refuse_mixture, release, set_up, world_of
from cod_agent.evaluation.result import MAIN, NO_CONTEXT, Arm, Comparison, Evaluation, Study, compare
from cod_agent.evaluation.statistics import AtLeast, Curve, Interval, Point, at_least, curve, difference, paired
from cod_agent.evaluation.study import evaluate, summarise

__all__ = [
    "MAIN",
    "NO_CONTEXT",
    "Arm",
    "AtLeast",
    "Comparison",
    "Curve",
    "Evaluation",
    "Interval",
    "Lane",
    "Plan",
    "Point",
    "Study",
    "Watch",
    "at_least",
    "compare",
    "curve",
    "difference",
    "draw",
    "evaluate",
    "kept_plan",
    "lanes_of",
    "live_all",
    "paired",
    "refuse_mixture",
    "release",
    "set_up",
    "summarise",
    "world_of",
]
