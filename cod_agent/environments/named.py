"""Worlds by name, as on the command line.

    WORLD or WORLD:PRESET              a built-in one, or one that an installed package names in the entry point group `cod.worlds`
    gymnasium:ID                       an environment of Gymnasium's registry (extra `gymnasium`)
    MODULE:NAME or MODULE:NAME:PRESET  one of yours

Behind a name of yours, or of a package, stands a class or a function that is called with the keywords `seed`, `split` and `form`, after
the preset if one is named, and gives the world: a `name`, a `form`, `start(task)` and `pack(n, index)`. Leave what you do not need
to `**_`. A world without `players` has no floor and no ceiling.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any

from cod_agent.environments.base import Form, Split
from cod_agent.errors import UnknownName, UsageError

WORLDS = {
    "alchemy": ("cod_agent.environments.alchemy", "Alchemy", "small"),
    "frozen-lake": ("cod_agent.environments.frozen_lake", "FrozenLake", "small"),
    "grid-navigation": ("cod_agent.environments.grid_navigation", "GridNavigation", "small"),
    "learn2ask": ("cod_agent.environments.learn2ask", "Learn2Ask", "small"),
    "optimal-control": ("cod_agent.environments.optimal_control", "OptimalControl", "small"),
    "pde-discovery": ("cod_agent.environments.pde_discovery", "PdeDiscovery", "small"),
    "terminal": ("cod_agent.environments.terminal", "Terminal", "small"),
}
"""World -> (module, class, default preset). A class takes (preset, seed, *, split, form) and has `pack(n, index)`."""

GROUP = "cod.worlds"
"""The entry points by which packages name worlds of theirs."""

GYMNASIUM = "gymnasium"

_CONTRACT = ("name", "start", "pack")


def make_world(name: str, *, seed: int = 0, split: Split = "eval", form: Form = "natural") -> Any:
    """The world of that name. Its own name leads to it again: by it a run that was interrupted finds its world.

    Raises:
        UnknownName: no such world or preset.
        UsageError: what stands behind the name is no world.
        MissingExtra: it is one of Gymnasium's, which is not installed.
    """
    world, _, preset = name.partition(":")
    if world in WORLDS:
        module, kind, default = WORLDS[world]
        return getattr(import_module(module), kind)(preset or default, seed, split=split, form=form)
    if world == GYMNASIUM and preset:
        from cod_agent.environments.gymnasium import from_gymnasium

        return from_gymnasium(preset, seed=seed, split=split, form=form)
    if world in _others():
        return _called(name, _loaded(_others()[world]), preset, seed=seed, split=split, form=form)
    if preset and _is_module(world):
        attribute, _, preset = preset.partition(":")
        return _called(name, _behind(world, attribute), preset, seed=seed, split=split, form=form)
    nearest = UnknownName.among("world", world, [*WORLDS, *_others(), f"{GYMNASIUM}:ID"])
    raise UnknownName(
        f"{nearest}; one of your own is MODULE:NAME, for example my_worlds:Shop where my_worlds.py lies or is installed"
    )


@cache
def _others() -> dict[str, EntryPoint]:
    """Worlds of other packages, by name."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _called(name: str, make: Callable[..., Any], preset: str, **how: Any) -> Any:
    """The world that `make` gives, under the name that it was asked for."""
    if not callable(make):
        raise UsageError(f"{name} is a {type(make).__name__}: name a class or a function that makes the world")
    try:
        world = make(*([preset] if preset else []), **how)
    except TypeError as error:
        raise UsageError(
            f"{name} must take the keywords seed, split and form, or **_ for the others ({error})"
        ) from error
    missing = [part for part in _CONTRACT if not hasattr(world, part)]
    if missing:
        raise UsageError(f"{name} makes a {type(world).__name__}, which is no world: it lacks {', '.join(missing)}")
    try:
        world.name, world.form = name, getattr(world, "form", "natural")
    except AttributeError as error:
        raise UsageError(
            f"{name} makes a {type(world).__name__}, whose name and form cannot be set ({error})"
        ) from error
    return world


def _loaded(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as error:  # a stranger's package may fail in any way
        raise UsageError(
            f"the world {entry.name!r} of package {entry.dist and entry.dist.name} cannot be loaded: {error!r}"
        ) from error


def _is_module(name: str) -> bool:
    """Whether there is such a module or a package that may have it, installed or in the current folder. Imports nothing."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(
            os.getcwd()
        )  # behind all others: nothing that is installed is hidden by what happens to lie here
    try:
        return find_spec(name.partition(".")[0]) is not None
    except ValueError:  # no name that a module could have
        return False


def _behind(module: str, attribute: str) -> Any:
    try:
        found = import_module(module)
    except Exception as error:  # a stranger's module may fail in any way
        raise UsageError(f"{module} cannot be imported: {error!r}") from error
    if not hasattr(found, attribute):
        known = [name for name, made in vars(found).items() if getattr(made, "__module__", None) == module]
        raise UnknownName.among(f"world in {module}", attribute, known)
    return getattr(found, attribute)
