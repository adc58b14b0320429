"""Text as a reader takes it: look-alike letters, entities and characters nobody sees, resolved one by one.

`plain` says what a text reads like and where each character of that stood, so that whoever finds something there can change the
text itself. Used to find our own delimiters in what others wrote (`cod_agent.context.defuse`), and orders in a note
(`cod_agent.trust.write_gate`).
"""

from __future__ import annotations

import html
import re
import unicodedata
from functools import lru_cache

_PIECE = re.compile(
    r"[ -%'-~\n\t\r]+|[&\uff06\ufe60](?:amp;)*(?:lt|gt|sol|vert|verbar|lsqb|rsqb|#0{0,20}[0-9]{2,6}|#x0{0,20}[0-9a-f]{2,5});?|.",
    re.DOTALL | re.IGNORECASE,
)
"""Ordinary text as it comes, an entity (also one written twice over), or a single character."""

_LOOKS = str.maketrans(
    "аәеіїјоорсухԁѕһӏԍԛԝвкмнтαβεικνορτυχγ‹›〈〉⟨⟩❮❯˂˃ᐸᐳ⁄∕╱⧸∣ǀ│",
    "aaeiijoopcyxdshlgqwbkmhtabeiknoptuxy<><><><><><>////|||",
)
"""Letters of other alphabets, and brackets, bars and strokes, that look like ASCII ones; NFKC knows the rest."""

UNSEEN = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ue000-\uf8ff]"
)
"""Characters that are not seen, or that turn the order of those around them: zero-width, bidi, tags, controls, private use."""


_UNSHOWN = re.compile(rf"{UNSEEN.pattern}|\r(?!\n)")
"""And a carriage return alone: at a terminal, what follows it is written over the line."""


def visible(text: str) -> str:
    """`text` with what is not seen written out (`\\u200b`): for terminals, which control characters would command."""
    return _UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


_ENTITY = "&\uff06\ufe60"


@lru_cache(maxsize=4096)
def _read(piece: str) -> str:
    """What one character, or one entity, reads like; "" if it is not seen."""
    said = unicodedata.normalize("NFKC", piece)
    while len(said) > 1 and (plainer := html.unescape(said if said.endswith(";") else f"{said};")) != said:
        said = plainer
    if UNSEEN.match(said):
        return ""
    said = "".join(part for part in unicodedata.normalize("NFKD", said) if not unicodedata.combining(part))
    return said.casefold().translate(_LOOKS)


def plain(text: str) -> tuple[str, list[int]]:
    """What a text reads like, in lower case, and for each character of that where in `text` it began."""
    if text.isascii() and "&" not in text and not UNSEEN.search(text):
        return text.lower(), list(range(len(text)))
    said: list[str] = []
    places: list[int] = []
    for piece in _PIECE.finditer(text):
        begin, end = piece.span()
        if end - begin > 1 and piece[0][0] not in _ENTITY:
            said.append(piece[0].lower())
            places += range(begin, end)
        else:
            read = _read(piece[0])
            said.append(read)
            places += [begin] * len(read)
    return "".join(said), places
