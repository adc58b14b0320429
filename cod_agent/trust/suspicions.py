"""What makes a line of a new note suspicious: plain functions from a proposed note to typed findings.

Each looks at what the update wrote, not at lines that an earlier decision let through; an order that a new line completes counts. Text is
read as a reader takes it (`cod_agent.trust.plain`), also backwards and through rot13, which cost an attacker nothing. None of this is
proof: an order in other words, in another language or in another cipher passes. That is what review, canaries and a judge of your own
are for.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

from cod_agent.context import Origin
from cod_agent.trust.blame import Line, quoted
from cod_agent.trust.plain import UNSEEN, plain

Kind = Literal["order", "role", "secret", "link", "command", "encoded", "hidden", "quote", "change", "length", "judge"]

LONG_QUOTE = 60
"""Characters on end in the words of a tool or the environment: more than a name, a number or a message's beginning."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something suspicious."""

    kind: Kind
    why: str
    line: int = 0
    """Counted from 1; 0 is the note as a whole."""
    text: str = ""
    """What was found, at most 80 characters."""

    def __str__(self) -> str:
        where = f" (line {self.line}: {self.text!r})" if self.line else f" ({self.text!r})" if self.text else ""
        return f"{self.kind}: {self.why}{where}"


@dataclass(frozen=True)
class Proposal:
    """A new note before it is anything more than that."""

    agent: str
    run: str
    position: int
    before: str
    """The note it was made from."""
    body: str
    lines: tuple[Line, ...]
    """Of `body`."""
    read: Mapping[Origin, str]
    """What the update read in the words of others, by origin."""

    @cached_property
    def new(self) -> tuple[tuple[int, str], ...]:
        """(number from 1, text) of the lines that this update wrote."""
        return tuple((number, line.text) for number, line in enumerate(self.lines, 1) if line.new)

    @cached_property
    def plain(self) -> tuple[str, list[int]]:
        """The note in one line as a reader takes it, and where in it each of its lines begins."""
        said = [" ".join(plain(line.text)[0].split()) for line in self.lines]
        return " ".join(said), [0, *accumulate(len(text) + 1 for text in said)][:-1]


Check = Callable[[Proposal], Iterator[Finding]]

_RULES = (
    r"(?:instruction|rule|prompt|order|direction|guideline|directive|polic(?:y|ies)|note|context|task|goal|safety|restriction|"
    r"above|previous|prior|earlier|before|everything|anything)"
)
_SAID = r"(?:answers?|repl(?:y|ies)|responses?|messages?|sentences?|outputs?|lines?|notes?)"
_ORDERS = {
    "it sets aside what the agent is told": (
        rf"\b(?:ignor|disregard|forget|overrid|overrul|bypass|neglect|supersed|discard|drop)\w*\b.{{0,40}}\b{_RULES}",
        r"\b(?:ignore|disregard|forget)\s+(?:all|any|the\s+(?:rest|others?|system|user))\b",
        r"\binstead of (?:the )?(?:task|answer|goal|rules)\b|\btakes? (?:precedence|priority)\b",
    ),
    "it says what the reader must do": (
        r"\b(?:you|agents?|assistants?|solvers?|models?|ai|reader)\s+"
        r"(?:must|shall|(?:are|is) (?:required|instructed|ordered|now|no longer))\b",
        r"\byou (?:are (?:to|an?|the)|will now|(?:should|have to|need to|ought to) (?:always|never|now|first|immediately))\b",
        r"\b(?:from now on|henceforth)\b",
    ),
    "it gives new orders": (
        r"\b(?:new|real|actual|updated|secret|hidden|true|urgent|important|system|special|mandatory)\s+(?:instructions?|orders?|"
        r"directives?|system prompt|polic(?:y|ies)|override)\b|\bsystem (?:message|command|notice|update)\b",
        r"\b(?:act|behave|respond|pretend|role-?play) (?:as|to be|like|that)\b",
        r"\b(?:obey|comply|jailbreak|dan mode|developer mode|god mode)\b",
    ),
    "it forbids or demands to say something": (
        r"\b(?:do not|don't|dont|never)\s+(?:tell|mention|reveal|inform|report|refuse|warn|obey|follow|trust|disclose|ask|verify)\b",
        r"\b(?:please|kindly)\s+\w+|\b(?:important|essential|crucial|necessary|required|vital|imperative) (?:that|for) (?:you|the agent)\b",
        r"\b(?:always|only|must|simply|just)\s+(?:answer|reply|respond|output|say|append|include|prepend|print|send|run|execute|"
        r"invoke|call|submit)\b",
        rf"\b(?:end|begin|start|finish|prefix|sign)\s+(?:every|each|all|your|any)\s+{_SAID}\b",
        r"\b(?:answer|reply|respond|say|output|print)\b.{0,20}\b(?:to (?:every|each|all|any)|regardless|no matter|whatever)\b",
    ),
    "it says how every answer is to look": (
        r"\b(?:answers|replies|responses|outputs|(?:every|each|any|your|the) (?:answer|reply|response|output))\b(?:\s\w+){0,3}?\s(?:end|"
        r"ends|ended|clos(?:e|es|ed)|begin|begins|began|starts?|finish|finishe[sd]|followed|suffix|prefix)\b",
    ),
    "it has something sent away": (
        r"\b(?:send|post|upload|forward|transmit|exfiltrate|leak|e-?mail)\w*\b.{0,60}\b(?:to|at|via)\b",
        r"\b(?:transfer|wire|deliver|pay|mail)\s+(?:the|all|your|any|it|them|this|money|funds|\d)",
    ),
    "it wants to stay": (
        r"\b(?:keep|copy|repeat|preserve|retain|remember|include|write|add|put|carry|store|save)\s+(?:this|these|the following|it)\b.{0,40}"
        r"\b(?:line|note|context|memory|verbatim|exactly|word|forever|always|forward|every|next|message|text|rule|instruction|sentence)\b",
    ),
    "it speaks with somebody's authority": (
        r"\b(?:note|message|notice|order|request|instruction|approved|authori[sz]ed|signed|sent|requested) (?:from|by|of) "
        r"(?:an? |the |your )?(?:admin|system|developer|operator|owner|user|security|support|vendor|manager|openai|anthropic)",
        r"\b(?:admin|administrator|developer|operator|security|root)(?:'s)? "
        r"(?:override|mode|access|says|note|notice|message|request|team)\b",
    ),
    "it gives an order in another language": (
        r"\b(?:ignorier|missachte|vergiss|ignorez|oubliez|ignora|olvida|ignorar|ignorera|negeer)\w*\b",
        r"忽略|无视|忘记|無視|игнорир|забудь|تجاهل|무시",
    ),
}
_ROLES = (
    r"<\s*(?:/\s*)?(?:system|user|assistant|tool|instructions?|prompt|im_start|im_end|inst|sys)\s*>|<\|[^<>|]{1,40}\|>|\[/?inst\]|"
    r"<<\s*/?sys\s*>>|#{1,6}\s*(?:system|instructions?)\b|(?:^|[\s\"'*_`(\[{>])(?:system|assistant|human|developer)"
    r"(?:\s+(?:message|prompt|note|instruction))?\s*[\]*_`)]*\s*:"
)
_SECRETS = (
    r"\b(?:pass(?:word|wd|phrase)s?|api[ _-]?keys?|(?:access|auth|bearer|secret|session) ?[ _-]?(?:tokens?|keys?)|private keys?|"
    r"credentials?|system prompt|environment variables?|env vars?|\.env\b|id_rsa)\b"
)
_LINKS = (
    r"\b(?:https?|ftp|wss?|file|data|javascript|mailto|ssh|git|magnet):/{0,2}[^\s]+|\bwww\.[^\s]+|\bhxxps?\b|"
    r"[\w.+-]{1,64}\s?(?:@|\(at\)|\[at\])\s?[\w-]+\s?(?:\.|\(dot\)|\[dot\])\s?[a-z]{2,}|\b(?:\d{1,3}\.){3}\d{1,3}\b|"
    r"\b[a-z0-9-]{1,63}(?:\.|\(dot\)|\[dot\])(?:com|net|org|io|ru|cn|info|biz|xyz|top|dev|app|ai|co|me|site|online|example|test)\b"
)
_COMMANDS = (
    r"\b(?:rm\s+-\w*[rf]|curl\s|wget\s|sudo\s|chmod\s|chown\s|mkfs|dd\s+if=|nc\s+-|netcat|powershell|cmd\.exe|bash\s+-|sh\s+-c|eval\s*\(|"
    r"exec\s*\(|os\.system|subprocess|__import__|import\s+os\b|pip3?\s+install|npm\s+(?:i|install)\b|git\s+(?:clone|push)|ssh\s+\w|scp\s|"
    r"drop\s+table|delete\s+from|insert\s+into|union\s+select|crontab|systemctl|base64\s+-|certutil|invoke-\w+|iex\b)|\|\s*(?:ba|z)?sh\b|"
    r"\$\([^)]*\)|/etc/(?:passwd|shadow)|~/\.\w+|(?:;|&&)\s*(?:rm|cat|curl|wget)\b|<\s*script\b|!\[[^\]]*\]\("
)
_COMPILED = {why: re.compile("|".join(patterns)) for why, patterns in _ORDERS.items()}
_ROLE, _SECRET, _LINK, _COMMAND = (re.compile(pattern) for pattern in (_ROLES, _SECRETS, _LINKS, _COMMANDS))
_PACKED = re.compile(
    r"(?P<bits>\b(?:[01]{7,8}\s?){4,})|(?P<hex>\b(?:[0-9a-f]{2}[\s:,-]?){12,})|"
    r"(?P<codes>(?:(?:\\{1,4}x|%|\\{1,4}u00|0x|&#x?)[0-9a-f]{2,4};?[\s,]*){4,})|"
    r"(?P<letters>\b(?:[^\W\d_][ .,_*/-]+){8,}[^\W\d_]\b)|(?P<morse>(?:[.·-]{1,5}[\s/|]+){8,})|(?P<packed>[a-z0-9+/_-]{12,}={0,2})",
    re.IGNORECASE,
)
_SPELT = re.compile(r"\b(?:\w[ ._*-]){5,}\w\b")
_SQUEEZED = re.compile(
    r"(?:ignor(?:e|ing)|disregard|forget|bypass|override)(?:all|any|every|your)?(?:the|of|these|those|my|your)*"
    r"(?:previous|prior|above|earlier|other|former|system|user)?(?:instruction|rule|order|prompt|directive|guideline|polic)|"
    r"systemprompt|newinstructions|(?:donot|dont|never)(?:tell|inform|warn|reveal)|jailbreak"
)
"""Orders without anything between their letters."""
_LEET = str.maketrans("013457@$!", "oieastasi")


def orders(proposal: Proposal) -> Iterator[Finding]:
    """Lines that tell the reader what to do, as plain text, spelt out, with digits for letters, backwards, or through rot13."""
    said, _ = proposal.plain
    found = [*_matches(proposal, "order", _COMPILED, said)]
    spelt = _SPELT.sub(lambda one: re.sub(r"[ ._*-]", "", one[0]).ljust(len(one[0])), said)
    for name, read in (
        ("spelt out", spelt),
        ("with digits for letters", said.translate(_LEET)),
        ("through rot13", codecs.encode(said, "rot13")),
    ):
        if read != said:
            patterns = {f"{why}, {name}": one for why, one in _COMPILED.items()}
            found += _matches(proposal, "order", patterns, read, but=said)
    for number, text in proposal.new:
        turned = plain(text)[0][::-1]
        whys = (why for why, one in _COMPILED.items() if one.search(turned))
        found += (_found("order", f"{why}, read backwards", number, text) for why in whys)
    yield from found or _run_together(proposal)


def _run_together(proposal: Proposal) -> Iterator[Finding]:
    """Orders that something stands between the letters of, wherever it was put."""
    before, after = (re.sub(r"[\W_]+", "", text) for text in (plain(proposal.before)[0], proposal.plain[0]))
    for found in _SQUEEZED.finditer(after):
        if found[0] not in before:
            yield _found("order", "run together, it sets aside what the agent is told", 0, found[0])


def roles(proposal: Proposal) -> Iterator[Finding]:
    """Marks of who speaks in a conversation (`system:`, chat templates' control words): a note has one speaker."""
    yield from _matches(proposal, "role", {"it marks who speaks": _ROLE}, proposal.plain[0])


def secrets(proposal: Proposal) -> Iterator[Finding]:
    """Lines about passwords, keys and prompts: they are nothing to carry from task to task."""
    yield from _matches(proposal, "secret", {"it is about secrets": _SECRET}, proposal.plain[0])


def links(proposal: Proposal) -> Iterator[Finding]:
    """Addresses: of the web, of mail, of machines. Whoever follows one leaves the task, and takes along what it knows."""
    yield from _matches(proposal, "link", {"it names an address": _LINK}, proposal.plain[0])


def commands(proposal: Proposal) -> Iterator[Finding]:
    """Command lines and code that do something when they are run."""
    yield from _matches(proposal, "command", {"it has a command in it": _COMMAND}, proposal.plain[0])


def encoded(proposal: Proposal) -> Iterator[Finding]:
    """Runs that look like base64, hexadecimal, escapes, bits, Morse or single letters: text that nobody reads and a model may."""
    for number, text in proposal.new:
        for found in _PACKED.finditer(text):
            if _IS[found.lastgroup or ""](found[0].lower() if found.lastgroup != "packed" else found[0]):
                yield _found("encoded", "it has encoded text in it", number, found[0])
                break


def hidden(proposal: Proposal) -> Iterator[Finding]:
    """Characters that are not seen or that turn the order of others, and words that mix alphabets to look like others."""
    for number, text in proposal.new:
        unseen = [char for at, char in enumerate(text) if UNSEEN.match(char) and not _in_emoji(text, at)]
        if unseen:
            yield _found("hidden", f"it has {len(unseen)} characters that are not seen", number, ascii(text))
        for word in re.findall(r"\w{4,}", text):
            alphabets = {unicodedata.name(char, "?").split()[0] for char in word if char.isalpha()}
            if (
                "LATIN" in alphabets
                and alphabets & {"CYRILLIC", "GREEK", "ARMENIAN", "CHEROKEE"}
                or "MATHEMATICAL" in alphabets
            ):
                yield _found("hidden", "a word of it mixes alphabets that look alike", number, word)
                break


def quotes(proposal: Proposal) -> Iterator[Finding]:
    """Long runs in the words of a tool or the environment: what was to be learned from is being handed on."""
    for origin in ("tool", "environment"):
        others = " ".join(proposal.read.get(origin, "").split())
        for number, text in proposal.new:
            if words := quoted(text, others, LONG_QUOTE):
                yield _found(
                    "quote", f"{LONG_QUOTE} characters or more are word for word from the {origin}", number, words
                )


CHECKS: tuple[Check, ...] = (orders, roles, secrets, links, commands, encoded, hidden, quotes)
"""All of them."""


def _matches(
    proposal: Proposal, kind: Kind, patterns: Mapping[str, re.Pattern[str]], said: str, but: str = ""
) -> Iterator[Finding]:
    """A finding for each pattern and new line that a match touches.

    Args:
        said: the note as `Proposal.plain` has it, or a transcription of it, letter for letter.
        but: matches that are there in this reading, too, are somebody else's.
    """
    begins, new = proposal.plain[1], {number for number, _ in proposal.new}
    for why, pattern in patterns.items():
        known = {found.span() for found in pattern.finditer(but)} if but else set()
        seen = set[int]()
        for found in pattern.finditer(said):
            if found.span() in known:
                continue
            first, last = (bisect_right(begins, at) for at in (found.start(), max(found.start(), found.end() - 1)))
            touched = next((number for number in range(first, last + 1) if number in new), None)
            if touched is not None and touched not in seen:
                seen.add(touched)
                yield _found(kind, why, touched, proposal.lines[touched - 1].text)


def _found(kind: Kind, why: str, number: int, text: str) -> Finding:
    said = " ".join(text.split())
    return Finding(kind, why, number, said if len(said) <= 80 else f"{said[:77]}...")


def _is_packed(text: str) -> bool:
    """Whether a run of letters and digits is base64 of something, or as mixed as it: no word, path or name is."""
    try:
        said = base64.b64decode(text.replace("-", "+").replace("_", "/").rstrip("=") + "==")
        if re.fullmatch(rb"[\w .,:;!?'\"()/<>\n-]+", said):
            return True
    except (binascii.Error, ValueError):
        pass
    kinds = (str.islower, str.isupper, str.isdigit)
    return (
        len(text) >= 24
        and all(any(kind(char) for char in text) for kind in kinds)
        and not re.search(r"[a-z]{6,}[_/-]", text)
    )


_IS: dict[str, Callable[[str], bool]] = {
    "hex": lambda text: bool(re.search("[a-f]", text) and re.search("[0-9]", text)),
    "codes": lambda text: True,
    "bits": lambda text: True,
    "letters": lambda text: True,
    "morse": lambda text: "-" in text and any(dot in text for dot in ".·"),
    "packed": _is_packed,
}
"""What else makes a match of `_PACKED` encoded text."""


def _in_emoji(text: str, at: int) -> bool:
    """Whether an unseen character belongs to an emoji, as joiners and variation selectors do."""
    around = text[max(at - 1, 0) : at]
    return (
        text[at] in "\ufe0f\u200d"
        and bool(around)
        and unicodedata.category(around) in ("So", "Sk", "Mn", "Me", "Po", "Nd")
    )
