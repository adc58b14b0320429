"""Models by name: `resolve("openai:gpt-5")`. Whoever resolves a model closes it, if it has a `close`.

    openai:NAME        any OpenAI-compatible endpoint
    litellm:NAME       what LiteLLM knows (extra `litellm`)
    gguf:PATH          a model file, in this process (extra `local`)
    embedded           the shipped policy; cloned, novice, embedded-base and naive-base are its weaker kin
    scripted:PLAYER    a player of the world itself; no weights, no tokens
    checkpoint:NAME    of a training's registry (extra `train`)

Each kind is imported when it is asked for. Other packages name kinds of theirs in the entry point group `cod.models`: a prefix, and
behind it a function that takes what stands behind the colon and the keywords of `resolve`, and gives the model. `checkpoint` is one.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from cod_agent.completions import Completion, Tokens
from cod_agent.environments.base import Environment, Form
from cod_agent.errors import CodError, UnknownName, UsageError
from cod_agent.models.base import Model, Sampling
from cod_agent.policies import POLICIES, folder_of

__all__ = ["Completion", "Model", "Sampling", "Tokens", "resolve"]

LONGEST_POLICY_ANSWER = 40
"""Tokens. The notes of the shipped policies take about half of it; a policy that rambles is cut here."""

PREFIXES = ("gguf", "litellm", "openai", "scripted")

GROUP = "cod.models"
"""The entry points by which packages name kinds of models."""


def resolve(
    name: str,
    *,
    world: Environment | None = None,
    sampling: Sampling | None = None,
    base_url: str | None = None,
    api_key: str | None = None,
    concurrency: int | None = None,
    timeout: float | None = None,
    stream: bool = False,
    exact: bool = False,
) -> Model:
    """The model of that name.

    Args:
        name: see above.
        world: whose players `scripted:` means.
        sampling: how answers are drawn; the model's own distribution if not given.
        base_url, api_key: of an endpoint; the usual environment variables if not given.
        concurrency: most answers under way at once.
        timeout: seconds one attempt may take.
        stream: read answers piece by piece, where the model can.
        exact: have an endpoint give token ids and log-probabilities; models in this process always do.

    Raises:
        UnknownName: nobody knows it; the message has the nearest name.
        UsageError: the name lacks its second half, the model file is no good, or `exact` is asked of one that has no tokens.
        MissingExtra: the optional package is not installed.
    """
    sampling = sampling or Sampling()
    if name in POLICIES:
        return _shipped(name, sampling, concurrency)
    prefix, colon, rest = name.partition(":")
    if prefix not in PREFIXES and prefix not in _others():
        raise UnknownName.among("model", name, [*POLICIES, *(f"{known}:" for known in (*PREFIXES, *_others()))])
    if not colon or not rest:
        raise UsageError(f"the model {name!r} lacks its second half: {_EXAMPLES.get(prefix, f'{prefix}:NAME')}")
    if prefix not in PREFIXES:
        how = {"base_url": base_url, "api_key": api_key, "concurrency": concurrency, "timeout": timeout}
        return _loaded(_others()[prefix])(rest, world=world, sampling=sampling, stream=stream, exact=exact, **how)
    given = {"concurrency": concurrency, "timeout": timeout}
    options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if exact and prefix in ("litellm", "scripted"):
        raise UsageError(
            f"--exact asks a server for token ids, which {prefix}:NAME has not: use openai:NAME, e.g. with vLLM"
        )
    if prefix == "openai":
        from cod_agent.models.openai import OpenAIModel

        return OpenAIModel(
            rest, sampling=sampling, base_url=base_url, api_key=api_key, stream=stream, exact=exact, **options
        )
    if prefix == "litellm":
        from cod_agent.models.litellm import LiteLLMModel

        return LiteLLMModel(rest, sampling=sampling, api_base=base_url, api_key=api_key, stream=stream, **options)
    if prefix == "gguf":
        return _file(rest, sampling, concurrency)
    return _player(name, rest, world, sampling)


_EXAMPLES = {
    "openai": "openai:NAME, for example openai:Qwen/Qwen3-8B",
    "litellm": "litellm:NAME, for example litellm:anthropic/claude-sonnet-4-5",
    "gguf": "gguf:PATH, for example gguf:models/smollm2.gguf",
    "scripted": "scripted:PLAYER, for example scripted:perfect",
}


@cache
def _others() -> dict[str, EntryPoint]:
    """Kinds of models of other packages, by prefix."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _loaded(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except CodError:
        raise
    except Exception as error:  # a stranger's package may fail in any way
        raise UsageError(
            f"models of kind {entry.name!r} of package {entry.dist and entry.dist.name} cannot be loaded: {error!r}"
        ) from error


def _shipped(name: str, sampling: Sampling, concurrency: int | None) -> Model:
    from cod_agent.models.embedded import GgufModel

    if sampling.max_tokens is None:
        sampling = replace(sampling, max_tokens=LONGEST_POLICY_ANSWER)
    file = folder_of(name) / "model.gguf"
    return GgufModel(file, name=name, form="compact", sampling=sampling, parallel=concurrency or 32)


def _file(path: str, sampling: Sampling, concurrency: int | None) -> Model:
    from cod_agent.models.embedded import GgufModel
    from cod_agent.models.gguf import read_metadata

    file = Path(path).expanduser()
    # Written by this project's exporter; no other model speaks the compact form.
    form: Form = "compact" if read_metadata(file).get("cod.form") == "compact" else "natural"
    return GgufModel(file, name=f"gguf:{path}", form=form, sampling=sampling, parallel=concurrency or 32)


def _player(name: str, player: str, world: Environment | None, sampling: Sampling) -> Model:
    from cod_agent.models.scripted import ScriptedModel

    players = getattr(world, "players", None)
    if not players:
        where = "no world is named (CoDAgent takes environment=...)" if world is None else f"{world.name} has none"
        raise UsageError(f"{name} is a player of a world, and {where}: choose another model, or a world with players")
    if player not in players:
        raise UnknownName.among("model", name, [f"scripted:{known}" for known in players])
    return ScriptedModel(name, players[player](random.Random(sampling.seed)), getattr(world, "form", "compact"))
