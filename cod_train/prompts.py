"""Token ids of a conversation: what the model was given and what it sampled stay as they were, only the rest is new.

A prompt's text is always what the chat template makes of the messages, as it is where the policy will be served. But
tokenising that text anew may give an earlier answer other ids than the ones that were sampled, and then the call is no
extension of the one before: it trains apart, at the price of its whole prompt. So the ids of earlier prompts and
answers are kept, and only the text behind them is tokenised. What stands behind an answer begins with the special token
that ends it; text on the two sides of a special token never shares a token.

Conversations are told apart by their text alone. Where two have the same text and were sampled in different ids, the
newer one stands for both: every call is exact, one of them is just not the extension of another.
"""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from cod_agent.errors import ModelRefused, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

REMEMBERED = 4096
"""Prompts and answers kept: a conversation needs its newest ones, so about twice the rollouts under way are enough."""

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class _Answered:
    """A prompt with its answer, up to the special token that ends it."""

    ids: tuple[int, ...]
    end: int | None
    """The special token; None if the answer was cut before one came."""
    place: int
    """Of the answer among the messages."""


class PromptIds:
    """messages -> token ids, for many conversations at once; one thread.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        remembered: prompts and answers kept; a conversation that was forgotten is tokenised whole.

    Raises:
        UsageError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, remembered: int = REMEMBERED) -> None:
        if not tokenizer.chat_template:
            raise UsageError("the tokenizer has no chat template: take the model's chat (instruct) variant, or set one")
        self.extended = 0
        """Prompts that go on from the newest answer in them, token for token."""
        self.apart = 0
        """Prompts that do not: the template changed the text, or the answer is not known (any more)."""
        self._tokenizer: Any = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._encode = lru_cache(remembered)(self._encode_anew)
        self._asked: _Recent[tuple[str, int]] = _Recent(remembered)
        self._answered: _Recent[_Answered] = _Recent(remembered)
        special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._ends = frozenset(special.values())
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """The prompt, with the opening of the assistant's turn.

        Args:
            messages: as chat templates take them (contents are strings, arguments of tool calls objects).
            tools: OpenAI's descriptions of functions.
            variables: of the template, such as `enable_thinking`.

        Raises:
            ModelRefused: the template does not take such a conversation.
        """
        text = self._render(messages, tools, variables)
        turns = [place for place, message in enumerate(messages) if message.get("role") == "assistant"]
        ids, kept = self._continued(text)
        if turns:
            self.extended += kept == turns[-1]
            self.apart += kept != turns[-1]
        self._asked.put(tuple(ids), (text, len(messages)))
        return ids

    def answered(self, prompt_ids: Sequence[int], sampled_ids: Sequence[int]) -> None:
        """Say what was sampled after a prompt that came from `ids`; any other prompt is passed over."""
        asked = self._asked.get(tuple(prompt_ids))
        if asked is None:
            return
        text, place = asked
        said, end = tuple(sampled_ids), None
        if said and said[-1] in self._ends:
            said, end = said[:-1], said[-1]
        # Spaces are not tidied up: the text must be the one that the next prompt repeats.
        spelt = self._tokenizer.decode(said, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        self._answered.put(text + str(spelt), _Answered((*prompt_ids, *said), end, place))

    def _continued(self, text: str) -> tuple[list[int], int | None]:
        """Ids of `text`, and the place of the newest answer whose sampled ids are among them."""
        for found in reversed([*self._special.finditer(text)]):
            known = self._answered.get(text[: found.start()])
            if known is not None:
                rest = self._encode(text[found.start() :])
                if known.end is None or rest[0] == known.end:
                    return [*known.ids, *rest], known.place
        return list(self._encode(text)), None

    def _encode_anew(self, text: str) -> tuple[int, ...]:
        if self._backend is not None:  # the same ids, without what transformers wraps around them
            return tuple(self._backend.encode(text, add_special_tokens=False).ids)
        return tuple(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        try:
            text = str(
                self._tokenizer.apply_chat_template(
                    [*messages],
                    tools=[*tools] if tools else None,
                    add_generation_prompt=True,
                    tokenize=False,
                    **variables,
                )
            )
            text.encode()  # half a surrogate pair is no text
        except Exception as error:  # whatever a stranger's template does
            raise ModelRefused(f"the model's chat template does not take this conversation: {error}") from None
        return text


class _Recent(Generic[V]):
    """A dictionary that keeps what was used last."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[Hashable, V] = OrderedDict()

    def put(self, key: Hashable, value: V) -> None:
        self._kept[key] = value
        self._kept.move_to_end(key)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def get(self, key: Hashable) -> V | None:
        value = self._kept.get(key)
        if value is not None:
            self._kept.move_to_end(key)
        return value


def warn_of_template(tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> None:
    """Say in the log what a chat template costs that keeps the calls of an episode apart."""
    if why := prefix_property(tokenizer, **variables):
        logger.warning("every call trains as a row of its own, which takes more tokens for the same gradient: %s", why)


def prefix_property(tokenizer: PreTrainedTokenizerBase, **variables: Any) -> str:
    """Why the prompts of a conversation would not extend each other under this chat template; "" if they do.

    Tries a conversation of three turns, with plain answers and with answers that reason first.

    Args:
        variables: of the template, as `PromptIds.ids` takes them.

    Raises:
        UsageError: there is no chat template.
        ModelRefused: it does not take a plain conversation.
    """
    answer, end = "It is 4.", tokenizer.eos_token
    if _stays_apart(tokenizer, answer, "", variables):
        return "its chat template changes the text of earlier turns"
    if end is None or _stays_apart(tokenizer, answer, end, variables):
        return f"turns do not end with the tokenizer's eos_token ({end!r}) in its chat template"
    if _stays_apart(tokenizer, f"<think>\nTwo and two.\n</think>\n\n{answer}", end, variables):
        return "its chat template drops the reasoning of earlier turns"
    return ""


def _stays_apart(tokenizer: PreTrainedTokenizerBase, answer: str, end: str, variables: Mapping[str, Any]) -> bool:
    prompts, said = PromptIds(tokenizer), [{"role": "user", "content": "What is 2 + 2?"}]
    sampled = tokenizer.encode(answer + end, add_special_tokens=False)
    for _ in range(3):
        prompts.answered(prompts.ids(said, **variables), sampled)
        said = [*said, {"role": "assistant", "content": answer}, {"role": "user", "content": "Sure?"}]
    prompts.ids(said, **variables)
    return prompts.apart > 0
