#!/usr/bin/env python3
"""Makes the GGUF fixtures beside this script. Not needed to run any test.

    pip install gguf==0.19.0 numpy==2.4.6
    python make.py                 # blocks/*.bin and models/*.delta
    python make.py DIR OUT.gguf    # one whole checkpoint of any directory, all layers

Models are golden checkpoints or their first layers, written with the gguf package's writer by the
rules that llama.cpp's converter publishes: its names, its metadata, its row order of llama's
query and key, one tensor for all experts, one added to Gemma's norms. What is kept of a file is a
delta, a tenth of it or less: which bytes are those of the checkpoint's safetensors files, and the
others. `unpack.rs` makes the file of it again. Blocks are random bytes of every type with the
values that the gguf package reads from them.
"""

import json
import pathlib
import struct
import sys
import tempfile

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE.parent / "golden"

# Golden checkpoint, layers kept, type of matrices.
MODELS = [
    ("llama3", None, Type.BF16),
    ("llama-tied-f32", None, Type.F32),
    ("mistral-window", None, Type.BF16),
    ("mixtral", None, Type.BF16),
    ("qwen2", None, Type.BF16),
    # The format has no dense layers between those with experts.
    ("qwen2-moe", 1, Type.BF16),
    ("qwen3", None, Type.BF16),
    ("qwen3-moe", None, Type.BF16),
    ("deepseek-v2", None, Type.BF16),
    ("deepseek-v2-lite", None, Type.BF16),
    ("deepseek-v3", None, Type.BF16),
    ("gpt-oss-mxfp4", None, Type.BF16),
    ("phi3", None, Type.BF16),
    ("gemma2", None, Type.BF16),
    ("gemma3", None, Type.BF16),
    ("llama3", 1, Type.Q8_0),
]
BLOCKS = [
    Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q2_K, Type.Q3_K, Type.Q4_K,
    Type.Q5_K, Type.Q6_K, Type.MXFP4,
]
# Where a block has f16 numbers: bytes from its beginning.
HALVES = {
    Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2], Type.Q8_0: [0],
    Type.Q2_K: [80, 82], Type.Q3_K: [108], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208],
    Type.MXFP4: [],
}


class Checkpoint:
    """Reads safetensors; values are f32, which holds bf16 and f16 exactly."""

    def __init__(self, directory):
        self.tensors = {}
        for path in sorted(directory.glob("model*.safetensors")):
            raw = path.read_bytes()
            (length,) = struct.unpack("<Q", raw[:8])
            for name, info in json.loads(raw[8 : 8 + length]).items():
                if name != "__metadata__":
                    begin, end = (8 + length + offset for offset in info["data_offsets"])
                    self.tensors[name] = (info["dtype"], info["shape"], raw[begin:end])

    def __contains__(self, name):
        return name in self.tensors

    def get(self, name):
        dtype, shape, raw = self.tensors[name]
        if dtype == "BF16":
            bits = np.frombuffer(raw, np.uint16).astype(np.uint32) << 16
            return bits.view(np.float32).reshape(shape)
        kinds = {"F32": np.float32, "F16": np.float16, "U8": np.uint8}
        values = np.frombuffer(raw, kinds[dtype]).reshape(shape)
        return values if dtype == "U8" else values.astype(np.float32)


class Model:
    def __init__(self, directory, layers, kind, out):
        self.directory = directory
        self.config = json.loads((self.directory / "config.json").read_text())
        self.checkpoint = Checkpoint(self.directory)
        self.layers = layers or self.config["num_hidden_layers"]
        self.kind = kind
        self.family = self.config["model_type"]
        self.arch = {
            "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2",
            "qwen2_moe": "qwen2moe", "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "deepseek_v2": "deepseek2",
            "deepseek_v3": "deepseek2", "gpt_oss": "gpt-oss", "phi3": "phi3", "gemma2": "gemma2",
            "gemma3_text": "gemma3",
        }[self.family]
        self.writer = gguf.GGUFWriter(out, self.arch)

    # Metadata.

    def number(self, key, value):
        self.writer.add_float32(f"{self.arch}.{key}", value)

    def count(self, key, value):
        self.writer.add_uint32(f"{self.arch}.{key}", value)

    def metadata(self):
        c = self.config
        self.writer.add_type("model")
        self.writer.add_name(self.directory.name)
        self.writer.add_file_type(0)
        self.count("block_count", self.layers)
        self.count("context_length", c["max_position_embeddings"])
        self.count("embedding_length", c["hidden_size"])
        self.count("feed_forward_length", c["intermediate_size"])
        self.count("attention.head_count", c["num_attention_heads"])
        self.count("vocab_size", c["vocab_size"])
        self.number("attention.layer_norm_rms_epsilon", c["rms_norm_eps"])
        rope = c.get("rope_parameters") or {}
        rope = rope.get("full_attention", rope)
        self.number("rope.freq_base", c.get("rope_theta") or rope["rope_theta"])
        scaling = c.get("rope_scaling") or rope
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind in ("linear", "yarn"):
            self.writer.add_string(f"{self.arch}.rope.scaling.type", kind)
            self.number("rope.scaling.factor", scaling["factor"])
        if kind == "yarn":
            context = scaling["original_max_position_embeddings"]
            self.count("rope.scaling.original_context_length", context)
            if "mscale_all_dim" in scaling:
                multiplier = 0.1 * scaling["mscale_all_dim"]
                self.number("rope.scaling.yarn_log_multiplier", multiplier)
        if kind == "llama3":
            self.rope_factors(scaling)
        if self.arch == "deepseek2":
            self.deepseek()
        else:
            self.heads()
        if self.family == "mixtral":
            self.count("expert_count", c["num_local_experts"])
            self.count("expert_used_count", c["num_experts_per_tok"])
        if self.family in ("mistral", "phi3") and c["sliding_window"]:
            self.count("attention.sliding_window", c["sliding_window"])
        if self.family == "qwen2_moe":
            self.count("expert_count", c["num_experts"])
            self.count("expert_used_count", c["num_experts_per_tok"])
            self.count("expert_feed_forward_length", c["moe_intermediate_size"])
            shared = c["shared_expert_intermediate_size"]
            self.count("expert_shared_feed_forward_length", shared)
        if self.family == "qwen3_moe":
            self.count("expert_count", c["num_local_experts"])
            self.count("expert_used_count", c["num_experts_per_tok"])
            self.count("expert_feed_forward_length", c["moe_intermediate_size"])
        if self.family == "gpt_oss":
            self.count("expert_count", c["num_local_experts"])
            self.count("expert_used_count", c["num_experts_per_tok"])
            self.count("expert_feed_forward_length", c["intermediate_size"])
            self.count("attention.sliding_window", c["sliding_window"])
        if self.arch.startswith("gemma"):
            self.gemma()

    def heads(self):
        c = self.config
        width = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        self.count("attention.head_count_kv", c["num_key_value_heads"])
        self.count("attention.key_length", width)
        self.count("attention.value_length", width)
        self.count("rope.dimension_count", width)

    def gemma(self):
        c = self.config
        self.count("attention.sliding_window", c["sliding_window"])
        # Not written for published models, whose scale follows from their size.
        self.number("attention.scale", c["query_pre_attn_scalar"] ** -0.5)
        sliding = [kind == "sliding_attention" for kind in c["layer_types"][: self.layers]]
        if self.arch == "gemma3":
            self.writer.add_array("gemma3.attention.sliding_window_pattern", sliding)
        else:
            self.number("attn_logit_softcapping", c["attn_logit_softcapping"])
            self.number("final_logit_softcapping", c["final_logit_softcapping"])

    def deepseek(self):
        c = self.config
        nope, rope = c["qk_nope_head_dim"], c["qk_rope_head_dim"]
        split = self.family == "deepseek_v3"
        if c["q_lora_rank"]:
            self.count("attention.q_lora_rank", c["q_lora_rank"])
        self.count("attention.kv_lora_rank", c["kv_lora_rank"])
        self.count("rope.dimension_count", rope)
        if split:
            self.count("attention.head_count_kv", 1)
            self.count("attention.key_length", c["kv_lora_rank"] + rope)
            self.count("attention.value_length", c["kv_lora_rank"])
            self.count("attention.key_length_mla", nope + rope)
            self.count("attention.value_length_mla", c["v_head_dim"])
        else:
            self.count("attention.head_count_kv", c["num_attention_heads"])
            self.count("attention.key_length", nope + rope)
            self.count("attention.value_length", c["v_head_dim"])
        self.count("expert_count", c["n_routed_experts"])
        self.count("expert_used_count", c["num_experts_per_tok"])
        self.count("expert_shared_count", c["n_shared_experts"])
        self.count("expert_feed_forward_length", c["moe_intermediate_size"])
        self.count("leading_dense_block_count", c["first_k_dense_replace"])
        self.number("expert_weights_scale", c["routed_scaling_factor"])
        self.writer.add_bool("deepseek2.expert_weights_norm", c["norm_topk_prob"])
        sigmoid = c["scoring_func"] == "sigmoid"
        self.count("expert_gating_func", 2 if sigmoid else 1)
        if c.get("topk_method") != "greedy":
            self.count("expert_group_count", c["n_group"])
            self.count("expert_group_used_count", c["topk_group"])

    def rope_factors(self, scaling):
        """What each frequency is divided by, as the converter evaluates it."""
        width = self.config["head_dim"]
        base = self.config.get("rope_theta") or scaling["rope_theta"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        context, factor = scaling["original_max_position_embeddings"], scaling["factor"]
        factors = []
        for i in range(0, width, 2):
            wavelength = 2 * np.pi * base ** (i / width)
            if wavelength < context / high:
                factors.append(1.0)
            elif wavelength > context / low:
                factors.append(factor)
            else:
                smooth = (context / wavelength - low) / (high - low)
                factors.append(1 / ((1 - smooth) / factor + smooth))
        self.writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))

    # Tokenizer.

    def tokenizer(self):
        tokenizer = json.loads((self.directory / "tokenizer.json").read_text())
        settings = json.loads((self.directory / "tokenizer_config.json").read_text())
        model = tokenizer["model"]
        words = {id: text for text, id in model["vocab"].items()}
        special = {token["id"] for token in tokenizer["added_tokens"] if token["special"]}
        words.update({token["id"]: token["content"] for token in tokenizer["added_tokens"]})
        texts, kinds, scores = [], [], []
        ranks = {}
        for rank, merge in enumerate(model["merges"]):
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            ranks.setdefault(left + right, rank)
        for id in range(self.config["vocab_size"]):
            text = words.get(id, f"[PAD{id}]")
            texts.append(text)
            scores.append(-float(ranks.get(text, 1e4 + id)))
            byte = model["byte_fallback"] and len(text) == 6 and text.startswith("<0x")
            if id not in words:
                kinds.append(gguf.TokenType.UNUSED)
            elif text == model["unk_token"]:
                kinds.append(gguf.TokenType.UNKNOWN)
            elif id in special:
                kinds.append(gguf.TokenType.CONTROL)
            else:
                kinds.append(gguf.TokenType.BYTE if byte else gguf.TokenType.NORMAL)
        w = self.writer
        if model["byte_fallback"]:
            w.add_tokenizer_model("llama")
            w.add_tokenizer_pre("default")
            w.add_token_scores(scores)
            w.add_unk_token_id(texts.index(model["unk_token"]))
            w.add_add_space_prefix(True)
        else:
            w.add_tokenizer_model("gpt2")
            w.add_tokenizer_pre("gpt-2")
            merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
            w.add_token_merges(merges)
        w.add_token_list(texts)
        w.add_token_types(kinds)
        w.add_bos_token_id(self.config["bos_token_id"])
        w.add_eos_token_id(self.config["eos_token_id"])
        w.add_add_bos_token(False)
        w.add_chat_template(settings["chat_template"])

    # Tensors.

    def put(self, name, values):
        """Vectors, routers and what decides the choice of experts stay f32."""
        if values.ndim == 1 or "ffn_gate_inp" in name or name.endswith(".bias"):
            self.writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
            return
        kind = self.kind
        if kind == Type.F32:
            self.writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
            return
        raw = gguf.quants.quantize(np.ascontiguousarray(values, np.float32), kind)
        self.writer.add_tensor(name, raw, raw_dtype=kind)

    def permuted(self, values, heads):
        """Rotary halves side by side: llama's own order, not that of the publication."""
        shape = values.shape
        split = values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
        return split.swapaxes(1, 2).reshape(shape)

    def outside(self):
        get = self.checkpoint.get
        self.put("token_embd.weight", get("model.embed_tokens.weight"))
        if not self.config.get("tie_word_embeddings"):
            self.put("output.weight", get("lm_head.weight"))
        self.put("output_norm.weight", self.norm("model.norm.weight"))

    def norm(self, name):
        return self.checkpoint.get(name) + np.float32(self.arch.startswith("gemma"))

    def layer(self, n):
        c, get = self.config, self.checkpoint.get
        here, there = f"model.layers.{n}.", f"blk.{n}."
        names = {
            "input_layernorm.weight": "attn_norm.weight",
            "post_attention_layernorm.weight": "ffn_norm.weight",
            "self_attn.q_norm.weight": "attn_q_norm.weight",
            "self_attn.k_norm.weight": "attn_k_norm.weight",
            "self_attn.sinks": "attn_sinks.weight",
            "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
            "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
            "self_attn.qkv_proj.weight": "attn_qkv.weight",
            "self_attn.q_a_proj.weight": "attn_q_a.weight",
            "self_attn.q_b_proj.weight": "attn_q_b.weight",
            "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
            "mlp.gate_up_proj.weight": "ffn_up.weight",
            "mlp.gate_proj.weight": "ffn_gate.weight",
            "mlp.up_proj.weight": "ffn_up.weight",
            "mlp.down_proj.weight": "ffn_down.weight",
            "mlp.gate.weight": "ffn_gate_inp.weight",
            "mlp.router.weight": "ffn_gate_inp.weight",
            "mlp.router.bias": "ffn_gate_inp.bias",
            "block_sparse_moe.gate.weight": "ffn_gate_inp.weight",
            "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
            "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
            "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
            "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
            "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
            "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
            "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
            "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
        }
        for part, short in [("q", "q"), ("k", "k"), ("v", "v"), ("o", "output")]:
            for end in ["weight", "bias"]:
                names[f"self_attn.{part}_proj.{end}"] = f"attn_{short}.{end}"
        if self.arch == "gpt-oss":
            names["post_attention_layernorm.weight"] = "post_attention_norm.weight"
        if self.arch.startswith("gemma"):
            names["post_attention_layernorm.weight"] = "post_attention_norm.weight"
            names["pre_feedforward_layernorm.weight"] = "ffn_norm.weight"
            names["post_feedforward_layernorm.weight"] = "post_ffw_norm.weight"
        for name, short in names.items():
            if here + name not in self.checkpoint:
                continue
            values = self.norm(here + name) if "norm" in name else get(here + name)
            if self.arch == "llama" and "q_proj" in name:
                values = self.permuted(values, c["num_attention_heads"])
            if self.arch == "llama" and "k_proj" in name:
                values = self.permuted(values, c["num_key_value_heads"])
            if "shared_expert_gate" in name:
                # The converter leaves out dimensions of one.
                values = values.squeeze(0)
            self.put(there + short, values)
        if self.arch == "deepseek2":
            self.latent(here, there)
        self.experts(here, there)

    def latent(self, here, there):
        c = self.config
        values = self.checkpoint.get(here + "self_attn.kv_b_proj.weight")
        if self.family == "deepseek_v2":
            self.put(there + "attn_kv_b.weight", values)
            return
        nope = c["qk_nope_head_dim"]
        heads = values.reshape(c["num_attention_heads"], -1, c["kv_lora_rank"])
        self.put(there + "attn_k_b.weight", heads[:, :nope].swapaxes(1, 2))
        self.put(there + "attn_v_b.weight", heads[:, nope:])

    def experts(self, here, there):
        get = self.checkpoint.get
        if self.arch == "gpt-oss":
            return self.gpt_oss(here + "mlp.experts.", there)
        for prefix, parts in [
            ("mlp.experts.", ["gate_proj", "up_proj", "down_proj"]),
            ("block_sparse_moe.experts.", ["w1", "w3", "w2"]),
        ]:
            if here + prefix + f"0.{parts[0]}.weight" not in self.checkpoint:
                continue
            count = 0
            while here + prefix + f"{count}.{parts[0]}.weight" in self.checkpoint:
                count += 1
            for part, short in zip(parts, ["gate", "up", "down"]):
                all = [get(here + prefix + f"{e}.{part}.weight") for e in range(count)]
                self.put(there + f"ffn_{short}_exps.weight", np.stack(all))

    def gpt_oss(self, here, there):
        """Gate and up are taken apart; MXFP4 blocks are put in the format's own order."""
        get = self.checkpoint.get
        bias = get(here + "gate_up_proj_bias")
        self.put(there + "ffn_gate_exps.bias", bias[:, 0::2])
        self.put(there + "ffn_up_exps.bias", bias[:, 1::2])
        self.put(there + "ffn_down_exps.bias", get(here + "down_proj_bias"))
        if here + "gate_up_proj" in self.checkpoint:
            both = get(here + "gate_up_proj").swapaxes(1, 2)
            self.put(there + "ffn_gate_exps.weight", both[:, 0::2])
            self.put(there + "ffn_up_exps.weight", both[:, 1::2])
            self.put(there + "ffn_down_exps.weight", get(here + "down_proj").swapaxes(1, 2))
            return
        both = self.blocks(get(here + "gate_up_proj_blocks"), get(here + "gate_up_proj_scales"))
        down = self.blocks(get(here + "down_proj_blocks"), get(here + "down_proj_scales"))
        for name, raw in [("gate", both[:, 0::2]), ("up", both[:, 1::2]), ("down", down)]:
            raw = np.ascontiguousarray(raw)
            self.writer.add_tensor(there + f"ffn_{name}_exps.weight", raw, raw_dtype=Type.MXFP4)

    @staticmethod
    def blocks(codes, scales):
        """Two neighbours a byte there; here elements i and i + 16, after the scale."""
        elements = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], 32)
        packed = elements[..., :16] | elements[..., 16:] << 4
        raw = np.concatenate([scales[..., None], packed], axis=-1)
        return raw.reshape(*raw.shape[:-2], -1)

    def write(self):
        self.metadata()
        self.tokenizer()
        self.outside()
        for n in range(self.layers):
            self.layer(n)
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def blocks(kind, out):
    """Four rows of 512 as bytes, then their values."""
    random = np.random.default_rng(int(kind))
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    raw = random.integers(0, 256, (4 * 512 // elements, size), np.uint8)
    for at in HALVES[kind]:
        halves = random.normal(0, 0.02, len(raw)).astype(np.float16)
        # Zero, a denormal, the largest.
        halves[:3] = np.array([0, 3e-7, 65504], np.float16)
        raw[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    if kind == Type.MXFP4:
        raw[:4, 0] = [0, 1, 2, 254]
    raw = raw.reshape(4, -1)
    values = gguf.quants.dequantize(raw, kind)
    out.write_bytes(raw.tobytes() + values.astype("<f4").tobytes())


SEEN = 64  # Bytes that make a match.
STEP = 8  # Everything begins at a multiple of it.
LITERAL = 0xFFFFFFFF


def delta(whole, source):
    """Runs of `(from, length)`, where `from` is a place in the source or LITERAL before bytes."""
    places = {}
    for at in range(0, len(source) - SEEN + 1, STEP):
        places.setdefault(source[at : at + SEEN], at)
    out, literal, at = [], bytearray(), 0

    def flush():
        if literal:
            out.append(struct.pack("<II", LITERAL, len(literal)) + literal)
            literal.clear()

    while at < len(whole):
        found = places.get(whole[at : at + SEEN])
        if found is None:
            literal += whole[at : at + STEP]
            at += STEP
            continue
        length = SEEN
        while whole[at + length : at + length + STEP] == source[found + length : found + length + STEP]:
            if not (more := len(whole[at + length : at + length + STEP])):
                break
            length += more
        flush()
        out.append(struct.pack("<II", found, length))
        at += length
    flush()
    return b"".join(out)


def undo(delta, source):
    out, at = bytearray(), 0
    while at < len(delta):
        begin, length = struct.unpack_from("<II", delta, at)
        at += 8
        if begin == LITERAL:
            out += delta[at : at + length]
            at += length
        else:
            out += source[begin : begin + length]
    return bytes(out)


def packed(name, layers, kind):
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "model.gguf"
        Model(GOLDEN / name, layers, kind, str(file)).write()
        whole = file.read_bytes()
    parts = sorted((GOLDEN / name).glob("model*.safetensors"))
    source = b"".join(part.read_bytes() for part in parts)
    short = delta(whole, source)
    assert undo(short, source) == whole
    print(name, kind.name, len(whole), len(short))
    (HERE / "models" / f"{name}-{kind.name.lower()}.delta").write_bytes(short)


def main():
    if len(sys.argv) == 3:
        directory = pathlib.Path(sys.argv[1])
        config = json.loads((directory / "config.json").read_text())
        plain = config.get("dtype") or config.get("torch_dtype")
        kind = Type.F32 if plain == "float32" else Type.BF16
        Model(directory, None, kind, sys.argv[2]).write()
        return
    (HERE / "blocks").mkdir(exist_ok=True)
    (HERE / "models").mkdir(exist_ok=True)
    for kind in BLOCKS:
        with np.errstate(over="ignore"):
            blocks(kind, HERE / "blocks" / f"{kind.name}.bin")
    for name, layers, kind in MODELS:
        packed(name, layers, kind)


if __name__ == "__main__":
    main()
