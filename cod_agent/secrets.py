"""Secrets never enter: their values are replaced by placeholders before anything is sent or stored.

    agent = CoDAgent(..., redact=Secrets("DEPLOY_LOGIN", values={"BANK": pin}))

Two sorts of secrets are found. *Named* ones are values this process knows: environment variables and what the application says. Their
placeholder is `[secret:NAME]`, and a tool that declares the name gets the value in its place (`resolve`); nothing else does. They are
also found as base64, hex and percent-encoded text and with the escapes of JSON, Python and HTML. *Kinds* are keys of others, known by
their form, as GitHub's or a private key; their placeholder is `[secret:KIND]`. It has no digest of the value: a short one would
confirm a guessed password, and a key for the digest would have to lie in the file beside it.

The kinds are few and our own. The libraries that have many are made for files: detect-secrets 1.5 takes half a millisecond for each
kilobyte with its expressions alone, and pulls in requests; here a text without secrets costs some microseconds.
"""

from __future__ import annotations

import json
import logging
import os
import re
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from html import escape
from string import ascii_letters, digits, punctuation
from typing import Any
from unicodedata import normalize
from urllib.parse import quote, quote_plus, unquote

from cod_agent.errors import UsageError
from cod_agent.trust.plain import visible

SHORTEST = 8
"""Characters of a value; what is shorter would be found everywhere."""
SUFFIXES = ("_KEY", "_TOKEN", "_SECRET", "_PASSWORD", "_CREDENTIALS")
"""Ends of the names of environment variables whose values are secret."""
MARK = "[secret:"
"""How a placeholder begins."""

_PLACEHOLDER = re.compile(r"\[secret:([A-Za-z0-9_.-]+)\]")
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_LOGIN = re.compile(r"://[^/\s]*@")
_IN_ADDRESS = re.compile(r"://[^/\s:@]*:([^/\s@]+)@")
_KEPT, _LONG, _LONGEST = 64, 200, 50_000
"""Texts remembered, and how many characters they have: most pass two or three times, as a result and in the next prompt."""
_LINE = 16
"""Characters of a line of a value of several lines that is a secret by itself."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """Keys of one form."""

    name: str
    signs: tuple[str, ...]
    """Every such text has one of these."""
    pattern: re.Pattern[str]
    """The group that matched is what is replaced; all of it if there are none."""


def _kind(name: str, signs: str, pattern: str) -> _Kind:
    return _Kind(name, tuple(signs.split()), re.compile(pattern, re.ASCII))


_SAID = r"\\?[\"']?\s*[:=]\s*\\?[\"']?"
"""Between a name and its value: in JSON, in JSON inside of JSON, in a shell, in a header."""
_KINDS = (
    _kind(
        "PRIVATE_KEY",
        "-----BEGIN",
        r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----"
        r"(?:[\s\S]{0,8000}?-----END [A-Z0-9 ]*-----|(?:\\[nr]|[\sA-Za-z0-9+/=:,-])*)",
    ),
    _kind("AWS_KEY", "AKIA ASIA", r"(?<![A-Z0-9])A[KS]IA[A-Z0-9]{16}(?![A-Z0-9])"),
    _kind("AWS_SECRET", "secret_access_key", rf"secret_access_key{_SAID}([A-Za-z0-9/+=]{{40}})"),
    _kind("AWS_SECRET", "SECRET_ACCESS_KEY", rf"SECRET_ACCESS_KEY{_SAID}([A-Za-z0-9/+=]{{40}})"),
    _kind("GITHUB_TOKEN", "ghp_ gho_ ghu_ ghs_ ghr_", r"(?<!\w)gh[pousr]_[A-Za-z0-9]{36,}"),
    _kind("GITHUB_TOKEN", "github_pat_", r"(?<!\w)github_pat_\w{22,}"),
    _kind("GITLAB_TOKEN", "glpat-", r"(?<!\w)glpat-[\w.-]{20,}"),
    _kind("SLACK_TOKEN", "xox xapp-", r"(?<!\w)(?:xox[a-z]|xapp)-[\w-]{10,}"),
    _kind("SLACK_WEBHOOK", "://hooks.slack", r"://hooks\.slack\.com/services/([\w/]{20,})"),
    _kind("STRIPE_KEY", "k_live_ k_test_", r"(?<!\w)[sr]k_(?:live|test)_\w{16,}"),
    _kind("API_KEY", "sk-", r"(?<![\w-])sk-[\w-]{20,}"),
    _kind("GOOGLE_KEY", "AIza", r"(?<!\w)AIza[\w-]{35}"),
    _kind("GOOGLE_SECRET", "GOCSPX-", r"(?<!\w)GOCSPX-[\w-]{20,}"),
    _kind("HUGGINGFACE_TOKEN", "hf_", r"(?<!\w)hf_[A-Za-z0-9]{30,}"),
    _kind("NPM_TOKEN", "npm_", r"(?<!\w)npm_[A-Za-z0-9]{36}"),
    _kind("PYPI_TOKEN", "pypi-", r"(?<!\w)pypi-[\w-]{50,}"),
    _kind("JWT", "eyJ", r"(?<![\w-])eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*"),
    _kind("PASSWORD", "://", r"(?<=://)[^/\s:@\"'\\]*:(?!\[secret:)([^/\s@\"'\\]+)@"),
    _kind(
        "AUTHORIZATION",
        "uthorization",
        rf"[Aa]uthorization{_SAID}(?:(?:[Bb]asic|[Bb]earer|[Tt]oken|Api-?Key)\s+([\w.~+/=-]{{6,}})|([\w.~+/=-]{{20,}}))",
    ),
    _kind("BEARER", "Bearer bearer", r"(?<!\w)[Bb]earer\s+([\w.~+/=-]{16,})"),
    _kind("API_KEY", "api-key Api-Key", rf"(?:api-key|Api-Key){_SAID}([\w.~+/=-]{{16,}})"),
)
_RAREST = "ZQXJzqjKVxYWUGHFBvkPLNDMROECIST_8976543210bwfgyp-:"
"""Those that texts have least first: to look for one character is ten times as quick as for several."""

_SOLID = ascii_letters + digits + punctuation
"""What secrets are made of, mostly."""
_LEADS = re.compile(
    r"(?:[Aa]uthorization[\"'\\\s:=]*(?:[A-Z][A-Za-z]+)?|[Bb]earer|secret_access_key|SECRET_ACCESS_KEY|[Aa]pi-[Kk]ey)[\"'\\\s:=]*\Z"
)
"""What may stand before a secret with a space between."""
_ENDED = re.compile("-----END [A-Z0-9 ]*-----")


class Secrets:
    """Replaces secrets by placeholders: text in, text out. It depends on nothing but the text and what it was made with.

    Args:
        names: environment variables whose values are secret, beside those that look it.
        values: more secrets, by name.
        environment: take every variable whose name ends as `SUFFIXES` for secret, if its value has at least `SHORTEST` characters,
            and the passwords of addresses in any variable.
        kinds: find keys of others by their form.

    Raises:
        UsageError: no such variable, a value is too short, or a name is none.
    """

    def __init__(
        self, *names: str, values: Mapping[str, str] | None = None, environment: bool = True, kinds: bool = True
    ) -> None:
        self._kinds = kinds
        self._values = dict(_looking_secret(os.environ)) if environment else {}
        for name in names:
            if name not in os.environ:
                raise UsageError(f"there is no environment variable {name}, which is to be kept secret: set it")
            self._values[name] = _checked(name, os.environ[name])
        self._values |= {name: _checked(name, value) for name, value in (values or {}).items()}
        by_form: dict[str, str] = {}
        for name, value in sorted(self._values.items()):
            for form in _forms(value):
                by_form.setdefault(form, f"{MARK}{name}]")
        said = " ".join(set(by_form.values()))
        # Longest first: a value may contain another. One that is part of a placeholder's text would never come to an end.
        self._forms = {f: by_form[f] for f in sorted(by_form, key=lambda f: (-len(f), f)) if f not in said}
        looks: dict[str, dict[str, None]] = {}
        signs = [sign for kind in _KINDS for sign in kind.signs] if kinds else []
        for look in (*signs, *(said for form in self._forms for said in (form, *_escaped(form)))):
            looks.setdefault(next((c for c in _RAREST if c in look), look[0]), {})[look] = None
        self._looks = tuple((has, tuple(those)) for has, those in looks.items())
        self._clean = lru_cache(_KEPT)(self._cleaned)
        self._broken = tuple(form for form in self._forms if form.strip(_SOLID) or any(c not in _SOLID for c in form))

    def __call__(self, text: str) -> str:
        if len(text) < SHORTEST:
            return text
        return self._clean(text) if _LONG < len(text) < _LONGEST else self._cleaned(text)

    @property
    def names(self) -> frozenset[str]:
        """Of the secrets that a tool may ask for."""
        return frozenset(self._values)

    def beside(self, values: Mapping[str, str]) -> Secrets:
        """These and more, by name; what is too short for a secret is none."""
        known = dict(self._values)
        for name, value in values.items():
            if len(value.strip()) >= SHORTEST and value.strip() not in known.values():
                while name in known:
                    name += "_"
                known[name] = value
        return Secrets(values=known, environment=False, kinds=self._kinds) if len(known) > len(self._values) else self

    def suspects(self, text: str) -> bool:
        """Whether there may be a secret in a text, or in one that is written in it as JSON. Quick, and never wrongly False."""
        for has, looks in self._looks:
            if has in text:
                for look in looks:
                    if look in text:
                        return True
        return False

    def resolve(self, value: Any, names: Collection[str]) -> Any:
        """A JSON value with the placeholders of these names replaced by what they stand for."""
        if isinstance(value, str):
            return _PLACEHOLDER.sub(lambda found: self._values[found[1]] if found[1] in names else found[0], value)
        if isinstance(value, dict):
            return {key: self.resolve(inner, names) for key, inner in value.items()}
        return type(value)(self.resolve(v, names) for v in value) if type(value) in (list, tuple) else value

    def settled(self, text: str) -> int:
        """How many characters at the beginning of an unfinished text can be cleaned without what follows."""
        end, before = len(text), -1
        while end != before:  # where a cut falls into a word, it goes before the word
            before, end = end, len(text[:end].rstrip(_SOLID))
            if led := _LEADS.search(text, max(0, end - 60), end):
                end = led.start()
            begun = text.rfind("-----BEGIN", 0, end)
            if begun >= 0 and not _ENDED.search(text, begun, end):
                end = begun
            for form in self._broken:
                at = text.find(form[0], max(0, end - len(form) + 1), end)
                while at >= 0 and not form.startswith(text[at:end]):
                    at = text.find(form[0], at + 1, end)
                end = end if at < 0 else at
        return end

    def _cleaned(self, text: str) -> str:
        before = ""
        while text != before and self.suspects(
            text
        ):  # where one key ends another may begin: what is clean stays as it is
            before, text = text, self._once(text)
        return text

    def _once(self, text: str) -> str:
        found = [form for form in self._forms if form in text]
        if found:
            text = re.sub("|".join(map(re.escape, found)), lambda match: self._forms[match[0]], text)
        for kind in _KINDS if self._kinds else ():
            if any(sign in text for sign in kind.signs):
                text = kind.pattern.sub(partial(_replaced, kind.name), text)
        return text


def without_login(address: str) -> str:
    """An address without the name and password in it, for showing."""
    return _LOGIN.sub("://", address)


def password_in(address: str) -> str:
    """The password in an address, or ""."""
    found = _IN_ADDRESS.search(address)
    return unquote(found[1]) if found else ""


class CleanFormatter(logging.Formatter):
    """A log's lines, tracebacks and all, without secrets, and without what would command a terminal."""

    def __init__(self, clean: Callable[[str], str], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clean = clean

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        return visible(self._clean(super().format(record)))


def _replaced(name: str, match: re.Match[str]) -> str:
    group = match.lastindex or 0
    begin, end = match.start(group) - match.start(), match.end(group) - match.start()
    return f"{match[0][:begin]}{MARK}{name}]{match[0][end:]}"


def _looking_secret(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name, value in environment.items():
        if not _NAME.fullmatch(name):
            continue
        if f"_{name.upper()}".endswith(SUFFIXES) and len(value.strip()) >= SHORTEST:
            yield name, value.strip()
        elif len(inside := password_in(value)) >= SHORTEST:
            yield f"{name}_PASSWORD", inside


def _checked(name: str, value: str) -> str:
    if not _NAME.fullmatch(name):
        raise UsageError(f"a secret's name has letters, digits and . _ -, not {name!r}")
    if len(value.strip()) < SHORTEST:
        raise UsageError(f"the secret {name} has fewer than {SHORTEST} characters: it would be found everywhere")
    return value.strip()


@lru_cache(1024)
def _forms(value: str) -> frozenset[str]:
    """How a value may be written: as it is, and encoded in the ways that programs show things."""
    lines = value.replace("\\n", "\n").splitlines()
    said = {value, "\n".join(lines), "\r\n".join(lines)}
    said |= {line.strip() for line in lines if len(line.strip()) >= _LINE and not line.startswith("-----")}
    said |= {normalize(form, text) for text in said for form in ("NFC", "NFD")}
    found: set[str] = set()
    for text in said:
        raw = text.encode("utf-8", "surrogateescape")
        quoted = {quote(raw, safe=""), quote(raw), quote_plus(raw)}
        found |= {text, raw.hex(), raw.hex().upper(), *quoted, *(re.sub("%..", _lower, one) for one in quoted)}
        found |= {*_shown(text), *_marked_up(text), repr(raw)[2:-1]}
        for encode in (b64encode, urlsafe_b64encode):
            found |= {encode(raw).decode(), *(_inside(encode, raw, before) for before in range(3))}
    for escaped in (_escaped, _escaped):  # JSON in JSON, as arguments of a tool in a request
        found |= {one for text in found for one in escaped(text)}
    return frozenset(form for form in found if len(form) >= SHORTEST)


def _lower(match: re.Match[str]) -> str:
    return match[0].lower()


def _escaped(text: str) -> Iterator[str]:
    for said in (json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]):
        yield said
        yield said.replace("/", "\\/")  # as PHP writes it, and what is put into a page


def _shown(text: str) -> Iterator[str]:
    """As Python shows it inside of another text, as errors do: which quotes have a stroke before them depends on the whole."""
    for show in (repr, ascii):
        said = show("\"'" + text)[4:-1]
        yield said
        yield said.replace("\\'", "'")


def _marked_up(text: str) -> Iterator[str]:
    """With the entities of HTML and XML, as different writers have them."""
    yield escape(text, quote=False)
    yield (said := escape(text))
    yield (said := said.replace("&#x27;", "&#39;"))
    yield said.replace("&quot;", "&#34;")


def _inside(encode: Callable[[bytes], bytes], raw: bytes, before: int) -> str:
    """The digits that `raw` has in any base64 where `before` bytes, modulo 3, stand before it."""
    said = encode(bytes(before) + raw).decode().rstrip("=")
    shared = (before + len(raw)) % 3 != 0
    return said[(0, 2, 3)[before] : len(said) - shared]


__all__ = ["MARK", "SHORTEST", "SUFFIXES", "CleanFormatter", "Secrets", "password_in", "without_login"]
