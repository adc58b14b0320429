"""The default solver: a dialogue between the model and a text environment, or one question where there is none."""

from __future__ import annotations

from cod_agent.context import Prompts, message, next_turn
from cod_agent.journal.boundary import Boundary
from cod_agent.tasks import Task


class TextSolver:
    """Observation in, answer out, until the environment says it is over.

    Args:
        prompts: how messages are worded.
    """

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts

    async def __call__(self, task: Task, context: str, tools: Boundary) -> str:
        if not tools.in_environment:
            return (await tools.ask(self._prompts.solve(task, context, None))).text
        seen = await tools.observe()
        said = self._prompts.solve(task, context, seen)
        answer = ""
        while not seen.done:
            answer = (await tools.ask(said)).text
            seen = await tools.act(answer)
            said = [*said, message("assistant", ("model", answer)), next_turn(self._prompts, seen)]
        return answer
