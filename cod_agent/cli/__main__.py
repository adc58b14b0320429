"""`python -m cod_agent.cli` is `cod`."""

from cod_agent.cli import main

main()
