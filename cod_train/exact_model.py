"""A checkpoint's model as transformers computes it in 32 bits: what everything that serves it is measured by."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cod_agent.errors import MissingExtra, UsageError
from cod_train.checkpoint_files import speaks, tensor_names, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_exactly(folder: Path, base: Path | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint's model in 32 bits, an adapter beside its base's weights, and its tokenizer.

    Raises:
        MissingExtra: torch or transformers is not installed.
        UsageError: it cannot be loaded, or its weights are not all there.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise MissingExtra("a checkpoint's own log-probabilities", "train") from None

    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        with quietly():
            model, info = load(base or folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(speaks(folder, base), local_files_only=True)
    except MemoryError:
        raise
    except Exception as error:  # what a damaged file or a config of nonsense raises is anybody's guess
        raise UsageError(f"transformers cannot load {base or folder}: {error}") from None
    for what in ("missing_keys", "mismatched_keys"):
        if odd := sorted(map(str, info.get(what) or ())):
            raise UsageError(
                f"the weights in {base or folder} do not fit its config.json ({what.replace('_', ' ')}: {odd[0]})"
            )
    if base is not None:
        model = adapted(model, folder)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def adapted(model: PreTrainedModel, adapter: Path) -> Any:
    """`model` with the PEFT adapter in the folder `adapter` beside its weights.

    Raises:
        MissingExtra: peft is not installed.
        UsageError: the adapter is none, or does not fit the model.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError:
        raise MissingExtra("an adapter", "train") from None
    try:
        with warnings.catch_warnings():  # of what does not fit, which is an error below
            warnings.simplefilter("ignore")
            both = PeftModel.from_pretrained(model, str(adapter))
    except (ValueError, OSError, RuntimeError, KeyError, TypeError) as error:
        raise UsageError(f"the adapter in {adapter} does not fit its base: {error}") from None
    odd = tensor_names(weight_files(adapter)[0]) ^ set(get_peft_model_state_dict(both))
    if odd:  # PEFT passes over what it has no place for
        raise UsageError(f"the adapter in {adapter} does not fit its base: {min(odd)} is on one side only")
    return both


def greedy(model: PreTrainedModel, prompt: list[int], longest: int) -> tuple[list[int], list[float]]:
    """The likeliest answer and its log-probabilities, which one forward pass over the whole gives again."""
    import torch

    said = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = said if said is not None else model.config.get_text_config().eos_token_id
    stop = set(ends) if isinstance(ends, list) else {ends}
    answer: list[int] = []
    feed, cache = torch.tensor([prompt], device=model.device), None
    while len(answer) < longest and not (answer and answer[-1] in stop):
        out = model(input_ids=feed, past_key_values=cache, use_cache=True)
        answer.append(int(out.logits[0, -1].argmax()))
        feed, cache = torch.tensor([[answer[-1]]], device=model.device), out.past_key_values
    whole = torch.tensor([[*prompt, *answer]], device=model.device)
    logits_T_V = model(input_ids=whole, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    chosen = torch.tensor(answer, device=model.device)[:, None]
    return answer, logits_T_V.log_softmax(-1).gather(1, chosen)[:, 0].tolist()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """No progress bars of transformers."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
