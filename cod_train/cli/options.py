"""Flags that several of these commands take, each said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

REGISTRY = Path("registry.db")
RegistryFile = Annotated[
    Path, typer.Option("--registry", envvar="COD_REGISTRY", help="The registry of checkpoints (default: registry.db).")
]
