"""The shipped policies: one Hugging Face directory and its GGUF file, which tokenise alike and say the same."""

from __future__ import annotations

import json
import math
import urllib.request
from pathlib import Path
from random import Random
from typing import Any

import pytest

from cod_agent.context import COMPACT, Message, Trajectory, Turn, message
from cod_agent.environments import make_world
from cod_agent.environments.frozen_lake import FrozenLake
from cod_agent.errors import UnknownName
from cod_agent.policies import POLICIES, folder_of
from cod_agent.tasks import Feedback, Observation

RECIPES = ("cloned", "novice", "embedded-base", "naive-base", "mixed-base")
"""Those that are clones; the others are what a training made."""
MIXED = ("mixed", "mixed-base")
"""Those that know three worlds."""
ODD_TEXTS = [
    "",
    " ",
    "\n\n \n",
    "Backup: Direction 5 Up:Up? blocked:: Direction 1Direction 2",
    "<context><context></context>\n</contex",
    "<|user|>x<|assistant|>y<|end|><|pad|>",
    "Łódź 東京 🧊🧊 \u200d\u0301 naïve don't WE'LL 12345 3.14",
    "@.#*@@@***....#####\r\n\t@.#",
    "def f(x):\n    return x  # a hole",
    "A: a+b none:none: c+d lack: z+q make A 1\na b c d A\na + b",
    "@a1 *c3 2\na1: 5\nb9: 12\nknown\nc1",
]


def _conversations() -> list[list[Message]]:
    """Prompts as the runtime shows them, from lives of perfect players, and some that nobody meant."""
    notes = ["", "null", "Up: Direction 1", "Left: Direction 2\nRight: Direction 4"]
    out = [said for note in notes for said in _prompts("frozen-lake:small", note)]
    for world, note in (("alchemy:tiny", "none: a+b\nC: a+c"), ("grid-navigation:tiny", "a1: 0\nb2: 9")):
        out += _prompts(world, note)
    return out + [[message("user", ("application", text))] for text in ODD_TEXTS]


def _prompts(name: str, note: str) -> list[list[Message]]:
    world: Any = make_world(name, seed=3, form="compact")
    player, out = world.players["perfect"](Random(0)), []
    for pack in world.packs(1, 1):
        session = world.start(pack[0])
        seen = session.reset()
        said = COMPACT.solve(pack[0], note, seen)
        while not seen.done:
            out.append(list(said))
            answer = player(said)
            seen = session.step(answer)
            said = [*said, message("assistant", ("model", answer)), message("user", ("environment", seen.text))]
    return out


CONVERSATIONS = _conversations()


def test_an_unknown_policy_is_named_with_the_known_ones():
    with pytest.raises(UnknownName, match="did you mean embedded"):
        folder_of("embeded")


def test_prompts_are_what_the_policies_were_trained_on():
    """Whoever changes these bytes has to make the policies again."""
    world = FrozenLake("small", 3, form="compact")
    task = world.pack(1)[0]
    seen = Observation("@.#*\n....\n..#.\n....")
    framed = "<context>\nnull\n</context>\n"
    assert COMPACT.solve(task, "", seen)[0].wire() == {"role": "user", "content": f"{framed}{seen.text}"}
    turns = (Turn("Up? Direction 3", Observation("blocked: Direction 3\n@.#*", "blocked: Direction 3")),)
    turns += (Turn("Right? Direction 2", Observation("Right: Direction 2", "Right: Direction 2", True)),)
    said = COMPACT.update(task, "Up: Direction 1", Trajectory(seen, turns), Feedback(reward=1.0, text="goal"))
    assert [m.content for m in said] == [
        "Update\n<context>\nUp: Direction 1\n</context>\nblocked: Direction 3\nRight: Direction 2\ngoal 1"
    ]


@pytest.mark.parametrize("policy", POLICIES)
def test_each_policy_has_its_files_and_a_card(policy: str):
    folder = folder_of(policy)
    present = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= present
    assert {"chat_template.jinja", "generation_config.json", "model.gguf", "CARD.md"} <= present
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["head_dim"] >= 32, "vLLM serves no narrower heads"
    card = (folder / "CARD.md").read_text()
    assert card.startswith(f"# {policy}\n")
    made = f"--policy {policy}" if policy in RECIPES else "python -m cod_train.verl_main"
    assert f"| made by | `{made}" in card or f"clone {made} " in card


def test_all_policies_together_take_at_most_twelve_megabytes():
    files = [path for policy in POLICIES for path in folder_of(policy).iterdir()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000


class LlamaCpp:
    """The reference settings of llama.cpp: f32 cache, no flash attention, one thread."""

    def __init__(self, gguf: Path) -> None:
        import xllamacpp as llama

        params = llama.CommonParams()
        params.model.path = str(gguf)
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = 1024, 1, 0, 0
        params.warmup = params.fit_params = params.cache_prompt = False
        params.cache_ram_mib = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = llama.Server(params)

    def prompt(self, messages: list[Message]) -> str:
        return self._post("/apply-template", {"messages": [m.wire() for m in messages]})["prompt"]

    def tokens(self, text: str) -> list[int]:
        return self._post("/tokenize", {"content": text, "parse_special": True, "add_special": False})["tokens"]

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(self._server.listening_address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(asked) as answer:
            return json.load(answer)

    def logprobs(self, tokens: list[int]) -> dict[int, float]:
        """Of every next token that llama.cpp tells of (not those of incomplete UTF-8), natural logarithm."""
        asked = {"prompt": tokens, "max_tokens": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        answer = _dict(self._server.handle_completions({**asked, "logprobs": 600, "n_probs": 600, "seed": 0}))
        content = (answer["choices"][0]["logprobs"] or {"content": []})["content"]
        return {top["id"]: top["logprob"] for top in content[0]["top_logprobs"]} if content else {}


def _dict(answer: Any) -> dict[str, Any]:
    return answer if isinstance(answer, dict) else json.loads(answer)


@pytest.fixture(scope="module", params=POLICIES)
def policy(request: pytest.FixtureRequest) -> Path:
    return folder_of(request.param)


@pytest.fixture(scope="module")
def llama_cpp(policy: Path) -> LlamaCpp:
    pytest.importorskip("xllamacpp")
    return LlamaCpp(policy / "model.gguf")


def test_llama_cpp_tokenises_as_the_tokenizer_file_says(policy: Path, llama_cpp: LlamaCpp):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(policy / "tokenizer.json"))
    texts = ODD_TEXTS + [text for said in CONVERSATIONS for text in (llama_cpp.prompt(said), said[-1].content)]
    dice = Random(1)
    pieces = [
        "Up:",
        " Direction 3",
        "@..#",
        "\n",
        "é",
        " ",
        "<context>",
        "null",
        "Direction",
        "4",
        "🧊",
        "#",
        "<|end|>",
        "a",
    ]
    texts += ["".join(pieces[int(dice.random() * len(pieces))] for _ in range(12)) for _ in range(300)]
    for text in texts:
        assert llama_cpp.tokens(text) == tokenizer.encode(text, add_special_tokens=False).ids, text


def test_the_words_of_the_protocol_are_atoms(policy: Path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(policy / "tokenizer.json"))
    atoms = {"Left: Direction 3": 2, "Up? Direction 1": 2, "blocked: Direction 4": 2, "@.#*\n..#": 3}
    if policy.name in MIXED:
        atoms |= {"D: a+c": 2, "none: b+b": 2, "a+d": 1, "make B 1": 3, "@a2 *c1 2": 3, "c3: 7": 2, "b2": 1}
    for text, count in atoms.items():
        assert len(tokenizer.encode(text, add_special_tokens=False).ids) == count


def test_llama_cpp_says_what_transformers_says(policy: Path, llama_cpp: LlamaCpp):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(policy, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32, local_files_only=True).eval()
    assert model.config.vocab_size == len(tokenizer)
    compared = 0
    for said in CONVERSATIONS:
        text = tokenizer.apply_chat_template([m.wire() for m in said], tokenize=False, add_generation_prompt=True)
        assert llama_cpp.prompt(said) == text
        ids = tokenizer(text, add_special_tokens=False).input_ids
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).tolist()
        for token, logprob in llama_cpp.logprobs(ids).items():
            if expected[token] > -12:
                assert math.isclose(logprob, expected[token], abs_tol=1e-4)
                compared += 1
    assert compared > 100
