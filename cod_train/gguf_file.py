"""The GGUF form of a Hugging Face folder, for the embedded engine: Llama models with a byte-level BPE tokenizer in the GPT-2 manner.

All weights are written as 32-bit floats, because llama.cpp computes 16-bit ones in reduced precision. Then tokens are equal and
log-probabilities agree to about 1e-5 (with an f32 cache, without flash attention). Every other model is llama.cpp's own converter's
affair (`convert_hf_to_gguf.py`): it knows hundreds of architectures and tokenizers, and guessing here would write files that
load and say something else.

Source: the GGUF specification and the tensor names of llama.cpp's `llama` architecture.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cod_agent.environments.base import Form
from cod_agent.errors import MissingExtra, UsageError
from cod_train.checkpoint_files import chat_template, form_of, needed_json, weight_files

if TYPE_CHECKING:
    import gguf

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
_PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def why_not(folder: Path) -> str:
    """Why `write_gguf` does not take the model in `folder`; "" if it does.

    Raises:
        UsageError: it is no Hugging Face folder.
    """
    config = needed_json(folder / "config.json")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    tokenizer = needed_json(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else {}
    pre = {key: (tokenizer.get("pre_tokenizer") or {}).get(key) for key in _PRE_TOKENIZER}
    model = tokenizer.get("model") or {}
    reasons = {
        f"its model_type is {config.get('model_type')!r}, not 'llama'": config.get("model_type") != "llama",
        f"its activation is {config.get('hidden_act')!r}": config.get("hidden_act", "silu") != "silu",
        "its projections have biases": bool(config.get("attention_bias") or config.get("mlp_bias")),
        "its rotary embedding is scaled": rope.get("rope_type", rope.get("type", "default")) != "default",
        "its tokenizer is no byte-level BPE in the GPT-2 manner": model.get("type") != "BPE"
        or pre != _PRE_TOKENIZER
        or tokenizer.get("normalizer") is not None
        or bool(model.get("ignore_merges")),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def write_gguf(folder: Path, out: Path, name: str | None = None) -> None:
    """Write the GGUF form of the model in the Hugging Face directory `folder` to the file `out`.

    Raises:
        UsageError: `folder` is no such directory, its model is of another kind, or its tokenizer has fewer or more tokens than the
            model has rows for.
        MissingExtra: gguf or safetensors is not installed.
    """
    if reason := why_not(folder):
        raise UsageError(
            f"{folder} has no GGUF form here: {reason}. Use llama.cpp's own converter: python convert_hf_to_gguf.py {folder} "
            f"--outfile {out} --outtype f32"
        )
    try:
        import gguf
    except ImportError:
        raise MissingExtra("a GGUF file", "policy") from None
    config = needed_json(folder / "config.json")
    writer = gguf.GGUFWriter(out, "llama")
    try:
        _describe_model(writer, config, name or folder.resolve().name, form_of(folder))
        _describe_tokens(writer, config, needed_json(folder / "tokenizer.json"), chat_template(folder))
        _add_tensors(writer, config, folder)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_tensors(writer: gguf.GGUFWriter, config: dict[str, Any], folder: Path) -> None:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise MissingExtra("reading weights", "policy") from None
    heads = {"attn_q": config["num_attention_heads"], "attn_k": _key_heads(config)}
    for file in weight_files(folder):
        for key, weight in sorted(load_file(file).items()):
            if key == "lm_head.weight" and config.get("tie_word_embeddings"):
                continue  # llama.cpp takes token_embd for the missing output
            short, tensor = key, weight.float().numpy()
            if key.startswith("model.layers."):
                _, _, layer, inner = key.removesuffix(".weight").split(".", 3)
                if inner not in _LAYER:
                    raise UsageError(f"{folder} has a tensor that no Llama has: {key}")
                if _LAYER[inner] in heads:
                    tensor = _interleaved(tensor, heads[_LAYER[inner]])
                short = f"blk.{layer}.{_LAYER[inner]}.weight"
            writer.add_tensor(_TOP.get(key, short), tensor)


def _describe_model(writer: gguf.GGUFWriter, config: dict[str, Any], name: str, form: Form) -> None:
    import gguf

    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    theta = (config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta", 10000.0)
    writer.add_name(name)
    if form == "compact":
        writer.add_string("cod.form", form)  # the runtime looks here
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(_key_heads(config))
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _describe_tokens(writer: gguf.GGUFWriter, config: dict[str, Any], tokenizer: dict[str, Any], template: str) -> None:
    import gguf

    text = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    kind = dict.fromkeys(text, gguf.TokenType.NORMAL)
    for added in tokenizer["added_tokens"]:  # as they read, with a real leading space: never byte-encoded
        text[added["id"]] = added["content"]
        kind[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    if sorted(text) != list(range(config["vocab_size"])):
        raise UsageError(f"{len(text)} tokens do not fit a model with {config['vocab_size']} rows")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([text[i] for i in range(len(text))])
    writer.add_token_types([kind[i] for i in range(len(text))])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_add_bos_token(False)  # chat templates write it
    writer.add_add_eos_token(False)
    if isinstance(config.get("bos_token_id"), int):
        writer.add_bos_token_id(config["bos_token_id"])
    ends = config["eos_token_id"]
    writer.add_eos_token_id(ends if isinstance(ends, int) else ends[0])
    if isinstance(config.get("pad_token_id"), int):
        writer.add_pad_token_id(config["pad_token_id"])
    writer.add_chat_template(template)


def _key_heads(config: dict[str, Any]) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in llama.cpp's order: rotary pairs side by side, not half a head apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
