"""One Hugging Face directory that transformers, verl and vLLM load, and its GGUF file for llama.cpp, which say the
same.

Weights are rounded to fp16 once; the GGUF file (`cod_train.gguf_file`) holds the rounded values as f32.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cod_train.gguf_file import write_gguf


def save_policy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write `model`, rounded to fp16, and its tokenizer to `folder`, and `model.gguf` beside them."""
    half = copy.deepcopy(model).half()
    # What servers sample with when nobody says otherwise: the model's own distribution, untruncated.
    half.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _name_tokenizer_for_all(folder / "tokenizer_config.json")
    (folder / "model.safetensors").chmod(0o644)  # its writer makes it private
    write_gguf(folder, folder / "model.gguf")


def _name_tokenizer_for_all(path: Path) -> None:
    """Write the class name that transformers 4 and 5 both know; 5 alone knows the one that 5 writes."""
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")
