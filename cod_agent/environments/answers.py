"""What an answer says in the natural form: what stands between answer tags, exactly once."""

from __future__ import annotations

OPEN, CLOSE = "<answer>", "</answer>"


def tagged(answer: object) -> str | None:
    """The text between the answer tags, or None if the answer is malformed: no text, or not exactly one pair of tags.

    What a thinking model says up to `</think>` does not count.
    """
    if not isinstance(answer, str):
        return None
    said = answer.rpartition("</think>")[2]
    if said.count(OPEN) != 1 or said.count(CLOSE) != 1:
        return None
    before, _, after = said.partition(OPEN)
    if CLOSE in before:
        return None
    return after.partition(CLOSE)[0].strip()
