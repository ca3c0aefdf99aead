"""A GGUF file or Hugging Face folder as a transformers model in f32 and a tokenizer.

Independent of Sluice and of llama.cpp's arithmetic: blocks are dequantised by the `gguf` package, everything after that is
transformers' own Llama or Qwen2. So it is the reference for what the numbers in a quantised file mean.
"""

import pathlib

import gguf
import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
}
PARTS = {  # blk.N.X -> model.layers.N.Y
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_model(path, attention="sdpa"):
    """An f32 transformers model in evaluation mode."""
    path = pathlib.Path(path)
    if path.is_dir():
        kind = dict(dtype=torch.float32, attn_implementation=attention, local_files_only=True)
        return transformers.AutoModelForCausalLM.from_pretrained(path, **kind).eval()

    reader = gguf.GGUFReader(path)
    meta = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.")}
    family = meta["general.architecture"]
    if family not in FAMILIES:
        raise SystemExit(f"{path}: architecture `{family}`; expected one of {', '.join(FAMILIES)}")
    get = lambda key, default=None: meta.get(f"{family}.{key}", default)
    heads, kv_heads = get("attention.head_count"), get("attention.head_count_kv")
    state = {}
    for tensor in reader.tensors:
        x = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        x = x.reshape(tensor.shape[::-1])  # GGUF lists the fastest dimension first
        name = hf_name(tensor.name)
        if family == "llama" and name.endswith("q_proj.weight"):
            x = unpermute(x, heads)
        if family == "llama" and name.endswith("k_proj.weight"):
            x = unpermute(x, kv_heads)
        state[name] = torch.from_numpy(np.ascontiguousarray(x))

    make_config, make_model = FAMILIES[family]
    config = make_config(
        hidden_size=get("embedding_length"),
        intermediate_size=get("feed_forward_length"),
        num_hidden_layers=get("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=get("attention.key_length", get("embedding_length") // heads),
        vocab_size=state["model.embed_tokens.weight"].shape[0],
        max_position_embeddings=get("context_length"),
        rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": get("rope.freq_base", 10000.0)},
        tie_word_embeddings="lm_head.weight" not in state,
        attn_implementation=attention,
    )
    model = make_model(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"{path}: tensors do not fit a {family}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.float().eval()


def hf_name(name):
    """token_embd.weight -> model.embed_tokens.weight, and so on; unknown names stay and are refused by the loader."""
    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    stem, _, kind = name.rpartition(".")
    if stem in whole:
        return f"{whole[stem]}.{kind}"
    block = stem.split(".")
    if len(block) == 3 and block[0] == "blk" and block[2] in PARTS:
        return f"model.layers.{block[1]}.{PARTS[block[2]]}.{kind}"
    return name


def unpermute(weight, n_heads):
    """Rows of a llama GGUF's q and k are interleaved for pairwise rotation (0, D/2, 1, D/2+1, ..); back to half-split."""
    rows, columns = weight.shape
    return weight.reshape(n_heads, rows // n_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def load_tokenizer(path):
    """Text to ids without special tokens added: `encode(text) -> list of int`."""
    path = pathlib.Path(path)
    if path.is_dir():
        return lambda text: Tokenizer.from_file(str(path / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    fields = gguf.GGUFReader(path).fields
    tokens, merges, pre = (fields[f"tokenizer.ggml.{n}"].contents() for n in ("tokens", "merges", "pre"))
    bpe = models.BPE({t: i for i, t in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges])
    tokenizer = Tokenizer(bpe)
    if pre == "smollm":
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    elif pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated")
        parts = [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        raise SystemExit(f"{path}: pre-tokenizer `{pre}`; expected smollm or qwen2")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
