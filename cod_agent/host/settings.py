"""How a host is set up: flags win over the environment (COD_HOST_*), the environment over a TOML file.

What nobody knows is an error that names the nearest thing it could have meant. docs/deploying.md has the table.
"""

from __future__ import annotations

import ipaddress
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cod_agent.errors import MissingExtra, UnknownName, UsageError
from cod_agent.secrets import Secrets, password_in

try:
    from pydantic import Field, SecretStr, ValidationError
    from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
except ImportError:
    raise MissingExtra("cod host", "host") from None

PREFIX = "COD_HOST_"
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Settings(BaseSettings):
    """All of them. A description is what docs/deploying.md and the command's help say."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, hide_input_in_errors=True)

    memory: Path = Field(Path("cod.db"), description="The run database; made if absent.")
    model: str = Field("", description="As `cod run` takes it, for example openai:NAME. Has no default.")
    base_url: str | None = Field(None, description="Of the model's endpoint; else OPENAI_BASE_URL.")
    api_key: SecretStr | None = Field(None, description="Of the model's endpoint; else OPENAI_API_KEY.")
    exact: bool = Field(False, description="Ask the endpoint for token ids, as vLLM gives them: what training needs.")
    temperature: float = Field(1.0, ge=0, description="Of the sampling.")
    max_tokens: int | None = Field(None, ge=1, description="Longest answer, in tokens.")
    timeout: float | None = Field(None, gt=0, description="Seconds one attempt of a model call may take.")
    concurrency: int = Field(64, ge=1, description="Model calls under way at once, for all agents together.")
    environment: str | None = Field(
        None, description="A world such as frozen-lake:small; without one, tasks are prompts."
    )
    form: Literal["natural", "compact"] | None = Field(None, description="How the world talks; else what fits.")
    updates: bool = Field(True, description="Rewrite the context after each judged task.")
    gate: Literal["open", "quarantine", "review"] = Field("open", description="Which updates wait for a decision.")
    max_context: int = Field(4000, ge=1, description="Longest context, in characters.")
    budget: str | None = Field(None, description="What each episode may spend, such as calls=20,seconds=600.")
    run_budget: str | None = Field(None, description="What each run may spend in all, such as money=5,prices=3/15.")
    host: str = Field("127.0.0.1", description="Where to listen. Anything but loopback needs a token.")
    port: int = Field(8080, ge=0, le=65535, description="0 takes a free one.")
    allowed_hosts: tuple[str, ...] = Field((), description="More names in requests' Host header, as behind a proxy.")
    token: SecretStr | None = Field(None, min_length=16, description="What clients show as a bearer token.")
    token_file: Path | None = Field(None, description="A file that holds the token.")
    max_body: int = Field(1 << 20, ge=1024, description="Longest body of a request, in bytes.")
    max_agents: int = Field(1024, ge=1, description="Agents held open at once; idle ones make room.")
    queue: int = Field(64, ge=1, description="Tasks and feedback that may wait for one run.")
    queue_all: int = Field(4096, ge=1, description="Tasks and feedback that may wait in all.")
    patience: float = Field(300.0, gt=0, description="Seconds a request waits for its outcome.")
    drain: float = Field(30.0, ge=0, description="Seconds that tasks under way get to finish after SIGTERM.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="What is logged.")

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *others: Any, **named: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What `load` read from flags and file, and the environment between the two."""
        given: Mapping[str, Any] = getattr(init_settings, "init_kwargs", {})
        flags, file = given.get("flags", {}), given.get("file", {})
        return (
            type(init_settings)(settings_cls, init_kwargs=dict(flags)),  # type: ignore[call-arg]
            named["env_settings"],
            type(init_settings)(settings_cls, init_kwargs=dict(file)),  # type: ignore[call-arg]
        )

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def open_reads(self) -> bool:
        """Whether reading needs no token: nobody but this machine can come in, not through a proxy either."""
        return self.loopback and not self.allowed_hosts

    @property
    def hosts(self) -> frozenset[str] | None:
        """Names a request's Host header may have; None for any."""
        if self.loopback or self.allowed_hosts:
            own = f"[{self.host}]" if ":" in self.host else self.host
            return frozenset(name.lower() for name in (*LOCAL_NAMES, own, *self.allowed_hosts))
        return None


def load(flags: Mapping[str, Any] | None = None, config: Path | None = None) -> Settings:
    """The settings of a host.

    Args:
        flags: by field; None is not given.
        config: a TOML file of the same names.

    Raises:
        UsageError: a value makes no sense, or the file cannot be read.
        UnknownName: nobody knows such a setting; the message has the nearest name.
    """
    file = _read(config) if config is not None else {}
    known = sorted(Settings.model_fields)
    for name in file:
        if name not in known:
            raise UnknownName.among(f"setting in {config}", name, known)
    for name in os.environ:
        if name.upper().startswith(PREFIX) and name[len(PREFIX) :].lower() not in known:
            raise UnknownName.among("variable", name, [f"{PREFIX}{one.upper()}" for one in known])
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    try:
        made = Settings(flags=given, file=file)  # type: ignore[call-arg]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "settings"
        raise UsageError(f"the setting {where} makes no sense: {first['msg']}") from None
    except ValueError as error:  # pydantic-settings: a variable that should be JSON and is not
        raise UsageError(f"a setting makes no sense: {error}") from None
    if not made.model:
        raise UsageError("name a model: --model openai:NAME, COD_HOST_MODEL, or model in the TOML file")
    return made


def token_of(settings: Settings) -> str | None:
    """The token clients have to show; None if there is none.

    Raises:
        UsageError: two were given, or the file is no good.
    """
    if settings.token_file is None:
        return settings.token.get_secret_value() if settings.token else None
    if settings.token is not None:
        raise UsageError("give a token or a token_file, not both")
    try:
        token = settings.token_file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the token_file cannot be read: {error}") from None
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(f"{settings.token_file} holds no token: one word of at least 16 characters is expected")
    return token


def secrets_of(settings: Settings) -> Secrets:
    """What must stand in no prompt, record or log: what the environment has, the clients' token, the endpoint's key and password."""
    key = settings.api_key.get_secret_value() if settings.api_key else ""
    said = {"COD_HOST_TOKEN": token_of(settings) or "", "COD_HOST_API_KEY": key}
    return Secrets().beside({**said, "COD_HOST_BASE_URL_PASSWORD": password_in(settings.base_url or "")})


def _read(config: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(config.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the settings cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{config} is no TOML: {error}") from None


__all__ = ["PREFIX", "Settings", "load", "secrets_of", "token_of"]
