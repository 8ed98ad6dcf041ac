#!/usr/bin/env python3
"""Makes the AWQ and GPTQ fixtures beside this script. Not needed to run any test.

    pip install numpy==2.4.6
    python make.py

A tiny llama with random weights, quantised to the nearest of sixteen steps per group, packed by
the published formats' definitions; and the same with the steps multiplied out, as f32. Weights
are W[out, in] = (q[out, in] - zero[group, out]) * scale[group, out].
"""

import json
import pathlib
import struct

import numpy as np

HERE = pathlib.Path(__file__).parent
HIDDEN, WIDTH, HEADS, KV_HEADS, VOCAB, LAYERS = 64, 128, 8, 4, 96, 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
    "intermediate_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu",
}
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def write(name, tensors, quantisation=None):
    directory = HERE / name
    directory.mkdir(exist_ok=True)
    config = dict(CONFIG)
    if quantisation:
        config["quantization_config"] = quantisation
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    header, blobs, offset = {}, [], 0
    kinds = {"float32": "F32", "float16": "F16", "int32": "I32"}
    for key, value in sorted(tensors.items()):
        raw = np.ascontiguousarray(value).tobytes()
        header[key] = {
            "dtype": kinds[str(value.dtype)], "shape": list(value.shape),
            "data_offsets": [offset, offset + len(raw)],
        }
        offset += len(raw)
        blobs.append(raw)
    text = json.dumps(header).encode()
    file = struct.pack("<Q", len(text)) + text + b"".join(blobs)
    (directory / "model.safetensors").write_bytes(file)


def words(nibbles):
    """[..., 8] values of four bits as one i32 each, the first in the lowest bits."""
    shifts = np.arange(8, dtype=np.uint32) * 4
    return np.bitwise_or.reduce(nibbles.astype(np.uint32) << shifts, axis=-1).view(np.int32)


def quantise(w, groups):
    """q[out, in], zero[group, out], scale[group, out] for a list of groups by input."""
    count = groups.max() + 1
    q = np.zeros(w.shape, np.int64)
    zero = np.zeros((count, len(w)), np.int64)
    scale = np.zeros((count, len(w)), np.float16)
    for g in range(count):
        part = w[:, groups == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        scale[g] = ((high - low) / 15).astype(np.float16)
        step = scale[g].astype(np.float32)
        zero[g] = np.clip(np.round(-low / step), 0, 15)
        q[:, groups == g] = np.clip(np.round(part / step[:, None]) + zero[g][:, None], 0, 15)
    # A zero of nought, which the first version of GPTQ stores as fifteen.
    zero[0, 0] = 0
    return q, zero, scale


def awq(q, zero, scale, groups):
    pack = lambda rows: words(rows.reshape(len(rows), -1, 8)[:, :, AWQ_ORDER])
    return {"qweight": pack(q.T), "qzeros": pack(zero), "scales": scale}


def gptq(less):
    def pack(q, zero, scale, groups):
        inputs, outputs = q.T.shape
        weights = words(q.T.reshape(inputs // 8, 8, outputs).swapaxes(1, 2))
        zeros = words(((zero - less) % 16).reshape(len(zero), outputs // 8, 8))
        return {
            "qweight": weights, "qzeros": zeros, "scales": scale,
            "g_idx": groups.astype(np.int32),
        }

    return pack


def dequantised(q, zero, scale, groups):
    steps = (q - zero.T[:, groups]).astype(np.float32)
    return {"weight": steps * scale.astype(np.float32).T[:, groups]}


def model(pack, groups_of):
    random = np.random.default_rng(7)
    normal = lambda *shape: (random.normal(0, 1, shape) / np.sqrt(shape[-1])).astype(np.float32)
    kv = HIDDEN // HEADS * KV_HEADS
    tensors = {
        "model.embed_tokens.weight": normal(VOCAB, HIDDEN) * 8,
        "model.norm.weight": np.ones(HIDDEN, np.float32),
    }
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (WIDTH, HIDDEN), "mlp.up_proj": (WIDTH, HIDDEN),
        "mlp.down_proj": (HIDDEN, WIDTH),
    }
    for layer in range(LAYERS):
        here = f"model.layers.{layer}."
        for norm in ["input_layernorm", "post_attention_layernorm"]:
            tensors[here + norm + ".weight"] = 1 + normal(HIDDEN)
        for name, shape in shapes.items():
            w = normal(*shape)
            groups = groups_of(shape[1], random)
            for part, values in pack(*quantise(w, groups), groups).items():
                tensors[here + name + "." + part] = values
    return tensors


def in_order(size):
    return lambda inputs, random: np.arange(inputs) // (size if size > 0 else inputs)


def listed(inputs, random):
    return random.permutation(np.arange(inputs) // 32)


def main():
    write("awq", model(awq, in_order(32)), {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": None,
    })
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
    write("gptq", model(gptq(1), in_order(32)), settings | {"sym": False, "damp_percent": 0.01})
    write("gptq-v2", model(gptq(0), in_order(32)), settings | {"checkpoint_format": "gptq_v2"})
    write("gptq-listed", model(gptq(1), listed), settings | {"desc_act": True})
    write("gptq-one-group", model(gptq(1), in_order(-1)), settings | {"group_size": -1})
    write("plain", model(dequantised, in_order(32)))
    write("plain-listed", model(dequantised, listed))
    write("plain-one-group", model(dequantised, in_order(-1)))


if __name__ == "__main__":
    main()
