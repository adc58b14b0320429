"""What the settings of a service come to: its world and its model, which understand each other, and what its runs keep of them."""

from __future__ import annotations

from typing import Any

from cod_agent.environments import make_world
from cod_agent.errors import UsageError
from cod_agent.host.settings import Settings
from cod_agent.models import resolve
from cod_agent.models.base import Model, Sampling


def set_up(settings: Settings) -> tuple[Any, Model]:
    """The world, if there is one, and the model, which understands it.

    Raises:
        UnknownName, UsageError, MissingExtra: see `make_world` and `resolve`.
    """
    # Players of a world speak its compact form; a language model says itself what it speaks.
    world = settings.environment and make_world(settings.environment, form=settings.form or "compact")
    model = resolve(
        settings.model,
        world=world or None,
        sampling=Sampling(temperature=settings.temperature, max_tokens=settings.max_tokens),
        base_url=settings.base_url,
        api_key=settings.api_key.get_secret_value() if settings.api_key else None,
        concurrency=settings.concurrency,
        timeout=settings.timeout,
        exact=settings.exact,
    )
    if not world:
        if model.form == "compact":
            raise UsageError(
                f"the model {model.name} speaks the compact form of a world only: name one (--environment frozen-lake:small), "
                "or a model that reads"
            )
        return None, model
    form = settings.form or model.form
    return (world if world.form == form else make_world(settings.environment or "", form=form)), model


def kept_of(settings: Settings) -> dict[str, Any]:
    """What is kept with each run."""
    names = {"model", "exact", "temperature", "max_tokens", "environment", "form"}
    return settings.model_dump(mode="json", include=names)
