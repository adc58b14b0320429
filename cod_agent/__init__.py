"""Agents with a long life: solve a task, rewrite the context, do better on the next one.

    from cod_agent import CoDAgent
    from cod_agent.environments import FrozenLake

    agent = CoDAgent("lake", model="embedded", memory="lake.db")
    for outcome in agent.run_sync(FrozenLake("small", seed=7, form="compact").pack(4)):
        print(outcome.position, outcome.reward)
    print(agent.context)

docs/ has a page per concept; `cod_agent.errors` draws the error tree.
"""

from cod_agent.agent import CoDAgent
from cod_agent.budget import Budget
from cod_agent.completions import Completion, Tokens
from cod_agent.context import Message, Prompts
from cod_agent.environments.base import Environment, Session
from cod_agent.errors import CodError
from cod_agent.journal.boundary import Boundary, idempotency_key, recorded_tool, tool
from cod_agent.memory import Memory
from cod_agent.models.base import Model, Sampling
from cod_agent.secrets import Secrets
from cod_agent.solvers.base import Solver
from cod_agent.tasks import Feedback, Observation, Outcome, Pack, Task
from cod_agent.trust.write_gate import WriteGate

__version__ = "0.1.0"

__all__ = [
    "Boundary",
    "Budget",
    "CoDAgent",
    "CodError",
    "Completion",
    "Environment",
    "Feedback",
    "Memory",
    "Message",
    "Model",
    "Observation",
    "Outcome",
    "Pack",
    "Prompts",
    "Sampling",
    "Secrets",
    "Session",
    "Solver",
    "Task",
    "Tokens",
    "WriteGate",
    "idempotency_key",
    "recorded_tool",
    "tool",
]
