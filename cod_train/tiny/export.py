"""One Hugging Face directory that transformers, verl and vLLM load, and its GGUF file for llama.cpp, which say the
same.

Weights are rounded to fp16 once; the GGUF file holds the rounded values as f32, because llama.cpp computes f16
weights in reduced precision. Then tokens are equal and log-probabilities agree to about 1e-5 (with an f32 cache,
without flash attention).

Source: the GGUF specification and the tensor names of llama.cpp's `llama` architecture.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


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


def write_gguf(folder: Path, out: Path, name: str | None = None) -> None:
    """The GGUF form of the tiny Llama in the Hugging Face directory `folder`.

    Raises:
        FileNotFoundError: `folder` is no such directory.
        ValueError: its tokenizer has fewer or more tokens than the model has rows for.
    """
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    weights = load_file(folder / "model.safetensors")
    writer = gguf.GGUFWriter(out, "llama")
    _describe_model(writer, config, name or folder.resolve().name)
    _describe_tokens(writer, config, tokenizer, (folder / "chat_template.jinja").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for key, weight in weights.items():
        short, tensor = key, weight.astype(np.float32)
        if key.startswith("model.layers."):
            _, _, layer, inner = key.removesuffix(".weight").split(".", 3)
            if _LAYER[inner] in heads:
                tensor = _interleaved(tensor, heads[_LAYER[inner]])
            short = f"blk.{layer}.{_LAYER[inner]}.weight"
        writer.add_tensor(_TOP.get(key, short), tensor)  # tied: llama.cpp takes token_embd for the missing output
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe_model(writer: gguf.GGUFWriter, config: dict[str, Any], name: str) -> None:
    writer.add_name(name)
    writer.add_string("cod.form", "compact")  # how worlds have to talk to it: the runtime looks here
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _describe_tokens(writer: gguf.GGUFWriter, config: dict[str, Any], tokenizer: dict[str, Any], template: str) -> None:
    text = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    kind = dict.fromkeys(text, gguf.TokenType.NORMAL)
    for added in tokenizer["added_tokens"]:  # as they read, with a real leading space: never byte-encoded
        text[added["id"]] = added["content"]
        kind[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    if sorted(text) != list(range(config["vocab_size"])):
        raise ValueError(f"{len(text)} tokens do not fit a model with {config['vocab_size']} rows")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([text[i] for i in range(len(text))])
    writer.add_token_types([kind[i] for i in range(len(text))])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_chat_template(template)


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in llama.cpp's order: rotary pairs side by side, not half a head apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
