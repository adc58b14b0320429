"""A solver that speaks HTTP to whoever trains it: what `cod.solver=http_solver:make` names in the tests."""

from __future__ import annotations

from cod_agent import Boundary, Sampling, Solver, Task
from cod_agent.context import COMPACT, message
from cod_agent.models.openai import OpenAIModel


def make(base_url: str, model: str) -> Solver:
    asked = OpenAIModel(model, base_url=base_url, api_key="none", exact=True, sampling=Sampling(max_tokens=8))

    async def solve(task: Task, context: str, tools: Boundary) -> str:
        seen = await tools.observe()
        said, answer = COMPACT.solve(task, context, seen), ""
        while not seen.done:
            answer = (await asked.complete(said)).text
            seen = await tools.act(answer)
            said = [*said, message("assistant", ("model", answer)), message("user", ("environment", seen.text))]
        return answer

    return solve
