"""What happens while serving: one JSON object a line in serve.jsonl, and a short line for people.

    {"time": 1764000000.1, "event": "switched", "weights": "green@91be02c4d1aa", "before": "blue@0f3c5a1e77b2"}

Every line has `time` (seconds since the epoch) and `event`: starting, ready, compared, switched, restarted, drained, stopped, died,
rejected, abandoned or trouble. The rest belongs to the event.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE = "serve.jsonl"


class Events:
    """Writes to `serve.jsonl` in a folder, after what is there.

    Args:
        say: gets the short line.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        self._say = say

    def __call__(self, event: str, **fields: Any) -> None:
        """Tell of an event; a full disk does not keep anybody from serving."""
        now = time.time()
        with contextlib.suppress(OSError), self.path.open("a") as out:
            out.write(json.dumps({"time": now, "event": event, **fields}, ensure_ascii=False) + "\n")
        words = [str(fields[key]) for key in ("weights", "why") if fields.get(key)]
        rest = {key: value for key, value in fields.items() if key not in ("weights", "why") and value is not None}
        beside = ", ".join(f"{key} {_short(value)}" for key, value in rest.items())
        clock = time.strftime("%H:%M:%S", time.localtime(now))
        self._say(f"{clock} {event} {': '.join(words)}{f' ({beside})' if beside else ''}")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
