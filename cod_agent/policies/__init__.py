"""The tiny language models that come with the package, each a Hugging Face directory with its GGUF file beside.

How each was made and what it measures is on its `CARD.md`; `python -m cod_train.tiny clone` and `cod train` make them again.
"""

from __future__ import annotations

from pathlib import Path

from cod_agent.errors import UnknownName, UsageError

POLICIES = ("embedded", "cloned", "novice", "embedded-base", "naive-base", "mixed", "mixed-base")


def folder_of(policy: str) -> Path:
    """The Hugging Face directory of a shipped policy; `model.gguf` lies in it.

    Raises:
        UnknownName: there is no such policy.
        UsageError: the installation lacks its files.
    """
    if policy not in POLICIES:
        raise UnknownName.among("policy", str(policy), list(POLICIES))
    folder = Path(__file__).parent / policy
    if not (folder / "model.gguf").is_file():
        raise UsageError(f"the files of {policy} are missing in {folder}: install the package again")
    return folder
