"""Token ids of conversations: as the tokenizer gives them, except where something else was sampled."""

from __future__ import annotations

import time
from random import Random
from typing import Any

import pytest

pytest.importorskip("transformers")

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cod_agent.context import COMPACT, message
from cod_agent.environments.frozen_lake import PLAYERS, FrozenLake
from cod_agent.errors import ModelRefused, UsageError
from cod_agent.policies import POLICIES, folder_of
from cod_train.prompts import PromptIds, prefix_property, warn_of_template

QWEN3_LIKE = (
    "{%- set ns = namespace(last=0) %}"
    "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{%- set said = m.content if loop.index0 > ns.last else m.content.split('</think>')[-1].lstrip('\\n') %}"
    "{{- '<|assistant|>' + said + '<|end|>\\n' }}"
    "{%- else %}{{- '<|user|>' + m.content + '\\n' }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}"
)


def tokenizer_of(policy: str = "embedded", template: str = "") -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(folder_of(policy))
    if template:
        tokenizer.chat_template = template
    return tokenizer


def plainly(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def sampled(tokenizer: Any, text: str, end: str = "<|end|>") -> list[int]:
    return tokenizer.encode(text + end, add_special_tokens=False)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_ids_are_the_tokenizers_where_answers_are_sampled_as_they_tokenise(policy: str) -> None:
    tokenizer = tokenizer_of(policy)
    prompts, world = PromptIds(tokenizer), FrozenLake("small", 3, form="compact")
    player, turns = PLAYERS["perfect"](Random(0)), 0
    for pack in world.packs(8, 1):
        session = world.start(pack[0])
        seen = session.reset()
        messages = COMPACT.solve(pack[0], "", seen)
        while not seen.done:
            said = [message.wire() for message in messages]
            ids = prompts.ids(said)
            assert ids == plainly(tokenizer, said)
            answer = player(messages)
            prompts.answered(ids, sampled(tokenizer, answer))
            seen, turns = session.step(answer), turns + 1
            messages = [*messages, message("assistant", ("model", answer)), message("user", ("environment", seen.text))]
    assert (prompts.extended, prompts.apart) == (turns - 8, 0) and turns > 16


def test_an_answer_sampled_in_unusual_tokens_keeps_them() -> None:
    tokenizer, said = tokenizer_of(), [user("goal")]
    prompts = PromptIds(tokenizer)
    odd = [*tokenizer.convert_tokens_to_ids([*"goal"]), 3]
    assert tokenizer.decode(odd) == "goal<|end|>" and odd != sampled(tokenizer, "goal")
    first = prompts.ids(said)
    prompts.answered(first, odd)
    said += [assistant("goal"), user("hole")]
    second = prompts.ids(said)
    assert second[: len(first) + len(odd)] == first + odd and second != plainly(tokenizer, said)
    assert tokenizer.decode(second) == tokenizer.decode(plainly(tokenizer, said))
    prompts.answered(second, odd)
    third = prompts.ids([*said, assistant("goal"), user("hole")])
    assert third[: len(second) + len(odd)] == second + odd
    assert (prompts.extended, prompts.apart) == (2, 0)


@pytest.mark.parametrize(
    "half",
    [pytest.param([0xC3, 0x28], id="bytes that are no text"), pytest.param([], id="nothing")],
)
def test_any_answer_keeps_its_ids(half: list[int]) -> None:
    tokenizer = tokenizer_of()
    prompts, alphabet = PromptIds(tokenizer), {0xC3: "Ã", 0x28: "("}
    ids = prompts.ids([user("x")])
    answer = [*tokenizer.convert_tokens_to_ids([alphabet[byte] for byte in half]), 3]
    prompts.answered(ids, answer)
    text = tokenizer.decode(answer, skip_special_tokens=True)
    assert prompts.ids([user("x"), assistant(text), user("y")])[: len(ids) + len(answer)] == ids + answer


def test_an_answer_that_was_cut_off_is_kept_and_ended_by_the_template() -> None:
    tokenizer, prompts = tokenizer_of(), PromptIds(tokenizer_of())
    ids = prompts.ids([user("x")])
    cut = sampled(tokenizer, "Left? Dir", end="")
    prompts.answered(ids, cut)
    after = prompts.ids([user("x"), assistant("Left? Dir"), user("y")])
    assert after[: len(ids) + len(cut) + 1] == [*ids, *cut, 3] and prompts.extended == 1


def test_an_answer_that_ended_otherwise_than_in_the_template_is_no_prefix() -> None:
    tokenizer, prompts = tokenizer_of(), PromptIds(tokenizer_of())
    ids, said = prompts.ids([user("x")]), [user("x"), assistant("goal"), user("y")]
    prompts.answered(ids, sampled(tokenizer, "goal", end="<|pad|>"))
    assert prompts.ids(said) == plainly(tokenizer, said) and prompts.apart == 1


def test_a_special_token_inside_an_answer_is_no_prefix() -> None:
    tokenizer, prompts = tokenizer_of(), PromptIds(tokenizer_of())
    ids, said = prompts.ids([user("x")]), [user("x"), assistant("goalhole"), user("y")]
    prompts.answered(ids, sampled(tokenizer, "goal<|user|>hole"))
    assert prompts.ids(said) == plainly(tokenizer, said) and prompts.apart == 1


def test_rollouts_of_one_pack_share_a_prompt_and_go_their_own_ways() -> None:
    tokenizer, prompts = tokenizer_of(), PromptIds(tokenizer_of())
    first = [prompts.ids([user("x")]) for _ in range(4)]
    answers = ["Up?", "Down?", "Left?", "Right?"]
    for ids, answer in zip(first, answers, strict=True):
        prompts.answered(ids, sampled(tokenizer, answer))
    for ids, answer in zip(first, answers, strict=True):
        said = [user("x"), assistant(answer), user("y")]
        assert prompts.ids(said) == plainly(tokenizer, said)
        assert prompts.ids(said)[: len(ids)] == ids
    assert prompts.apart == 0


def test_a_template_that_drops_reasoning_keeps_calls_apart_and_counts_them() -> None:
    tokenizer = tokenizer_of(template=QWEN3_LIKE)
    prompts, said = PromptIds(tokenizer), [user("x")]
    for answer in ("<think>\nhm\n</think>\n\nUp?", "<think>\nso\n</think>\n\nDown?", "Left?"):
        ids = prompts.ids(said)
        assert ids == plainly(tokenizer, said)
        prompts.answered(ids, sampled(tokenizer, answer))
        said = [*said, assistant(answer), user("y")]
    assert (prompts.extended, prompts.apart) == (0, 2)
    assert prompts.ids(said) == plainly(tokenizer, said)
    assert (prompts.extended, prompts.apart) == (1, 2)  # the last answer had no reasoning to drop


def test_what_is_forgotten_is_tokenised_whole() -> None:
    tokenizer, prompts = tokenizer_of(), PromptIds(tokenizer_of(), remembered=2)
    for name in "abc":
        prompts.answered(prompts.ids([user(name)]), sampled(tokenizer, "goal"))
    for name, extended in (("c", 1), ("a", 1)):
        said = [user(name), assistant("goal"), user("y")]
        assert prompts.ids(said) == plainly(tokenizer, said) and prompts.extended == extended
    prompts.answered([1, 2, 3], [3])  # of a prompt nobody asked for: nothing to remember


def test_a_thousand_calls_a_second() -> None:
    """The tiny policy's whole rollout costs about a millisecond a call; its prompts must cost a small part of that."""
    tokenizer, prompts = tokenizer_of(), PromptIds(tokenizer_of())
    answer, started, calls = sampled(tokenizer, "Left? Direction 1"), time.process_time(), 0
    for rollout in range(40):
        said = [user(f"Update: null\n@.#*\n....\n....\n..{rollout}")]
        for step in range(7):
            prompts.answered(prompts.ids(said), answer)
            said = [*said, assistant("Left? Direction 1"), user(f"Left: blocked:\n@.#*\n....\n....\n..{step}{rollout}")]
            calls += 1
    assert calls / (time.process_time() - started) > 1000


def test_the_prefix_property_of_templates() -> None:
    assert [prefix_property(tokenizer_of(policy)) for policy in POLICIES] == [""] * len(POLICIES)
    assert "reasoning" in prefix_property(tokenizer_of(template=QWEN3_LIKE))
    other_end = tokenizer_of()
    other_end.eos_token = "<|pad|>"
    assert "'<|pad|>'" in prefix_property(other_end)
    numbered = "{% for m in messages %}{{ m.role + (messages | length | string) + m.content }}<|end|>{% endfor %}"
    assert "earlier turns" in prefix_property(tokenizer_of(template=numbered))


def test_templates_that_do_not_do() -> None:
    with pytest.raises(ModelRefused, match="only users"):
        PromptIds(tokenizer_of(template="{{ raise_exception('only users') }}")).ids([user("x")])
    with pytest.raises(ModelRefused, match="surrogates"):
        PromptIds(tokenizer_of()).ids([user("\ud800")])
    bare = tokenizer_of()
    bare.chat_template = None
    with pytest.raises(UsageError, match="no chat template"):
        PromptIds(bare)
    seen = PromptIds(tokenizer_of(template="{% if enable_thinking %}goal{% else %}hole{% endif %}{{ tools }}"))
    assert seen.ids([user("x")], enable_thinking=True) != seen.ids([user("x")])


def test_a_template_that_keeps_calls_apart_is_said_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_template(tokenizer_of(POLICIES[0]), {})
    assert not caplog.records
    warn_of_template(tokenizer_of(template=QWEN3_LIKE), {})
    assert "drops the reasoning of earlier turns" in caplog.text
