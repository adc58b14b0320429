"""How a task is solved. A solver is any `async (task, context, tools) -> answer`, of any framework, or of none.

`tools` is a sequence of recorded functions. It also has `observe()` and `act(answer)` for the environment's session, and
`ask(messages)` for the agent's model (see `cod_agent.journal.boundary.Boundary`). A solver with its own HTTP client builds it
with `cod_agent.journal.http.recording_client()` and is recorded too. After a crash the solver runs again from its beginning and meets
its own recorded past; it must ask for the same things in the same situation, and keep nothing between tasks.
"""

from cod_agent.solvers.agentscope import AgentScopeSolver
from cod_agent.solvers.base import Solver
from cod_agent.solvers.text import TextSolver

__all__ = ["AgentScopeSolver", "Solver", "TextSolver"]
