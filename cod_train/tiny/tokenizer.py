"""The tokenizers of the tiny policies: every fact is one repeated pair of tokens, and any other text still encodes.

A quarter of a million parameters learn to copy `Left:` ` Direction 3` from a note if that is two tokens, always the
same two. So the words of the compact protocol are atomic added tokens, and each row of a 3x3 or 4x4 map is one token
of a byte-level BPE, whose merges are learnt from just these rows and words; everything else falls apart into bytes.

`LAKES` is for policies that know frozen lakes only, `MIXED` for those that know alchemy:tiny and grid-navigation:tiny, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations_with_replacement, product

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cod_agent.context import CLOSE, OPEN
from cod_agent.environments.frozen_lake import MOVES

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
CODES = tuple(f" Direction {n}" for n in (1, 2, 3, 4))
FACTS = tuple(f"{move}:" for move in MOVES)
INTENTS = tuple(f"{move}?" for move in MOVES)
MAX_POSITIONS = 1024

PAIRS = tuple(f"{one}+{other}" for one, other in combinations_with_replacement("abcd", 2))
"""What can be combined in alchemy:tiny, what that makes, and how facts about it begin."""
PRODUCTS = tuple("ABCD")
EFFECTS = tuple(f"{made}:" for made in (*PRODUCTS, "none"))
CELLS = tuple(f"{column}{row}" for row in (1, 2, 3) for column in "abc")
"""Of grid-navigation:tiny."""
COSTS = tuple(f" {digit}" for digit in range(10))

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}<|end|>"
    "{% else %}<|user|>{{ m['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _rows() -> list[str]:
    """Every row a 3x3 or 4x4 map can have: at most one player and one goal."""
    return [
        row
        for size in (3, 4)
        for row in map("".join, product("@*#.", repeat=size))
        if row.count("@") <= 1 and row.count("*") <= 1
    ]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What is one token each, beside the bytes."""

    words: tuple[str, ...]
    """Merged where they stand between spaces."""
    atoms: tuple[str, ...]
    """Added tokens: one wherever they stand."""
    worlds: tuple[str, ...]
    """Where these are the words for everything."""


LAKES = Vocabulary(
    (
        *_rows(),
        *("Update", "null", "goal", "hole", "steps", "invalid", " 0", " 1", "Direction", " Direction"),
        *("Up", "Down", "Left", "Right"),
    ),
    (*CODES, *FACTS, "blocked:", *INTENTS, OPEN, CLOSE),
    ("frozen-lake:small", "frozen-lake:tiny"),
)
MIXED = Vocabulary(
    (
        *LAKES.words,
        *("made", "rounds", "stuck", "missed", "illegal", "known", "make", "a", " b", " c", " d"),
        *(f" {product}" for product in PRODUCTS),
        *COSTS,
    ),
    (
        *LAKES.atoms,
        *(*PAIRS, *(f" {pair}" for pair in PAIRS), *EFFECTS, "lack:"),
        *(*CELLS, *(f"{cell}:" for cell in CELLS), *(f"@{cell}" for cell in CELLS), *(f" *{cell}" for cell in CELLS)),
    ),
    ("frozen-lake:small", "alchemy:tiny", "grid-navigation:tiny"),
)


def build_tokenizer(vocabulary: Vocabulary = LAKES) -> PreTrainedTokenizerFast:
    """The tokenizer, the same each time; `len()` of it is the vocabulary size of the model."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,  # more than it takes: merging ends when each row and word is one token
        min_frequency=1,
        special_tokens=[PAD, USER, ASSISTANT, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(vocabulary.words, trainer)
    bpe.add_tokens([AddedToken(atom, normalized=False) for atom in vocabulary.atoms])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def vocabulary_of(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    """Whose words a policy has that was made here."""
    return MIXED if set(MIXED.atoms) <= tokenizer.get_added_vocab().keys() else LAKES
