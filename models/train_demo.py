#!/usr/bin/env python3
"""Train a small demo model (Mixtral or DeepSeek-V3 architecture) on public-domain text.

The result is a real trained checkpoint in Hugging Face layout (bf16 safetensors, tokenizer.json,
chat_template) that writes readable, if silly, English. It is small enough to serve anywhere.

Data: tinyshakespeare (raw text, and chat pairs: one speech is the "user" turn, the next speech is
the "assistant" turn) and War and Peace (raw text).

  train_demo.py --corpus corpus --out demo --steps 4000
  train_demo.py --sample demo                    # print samples of a finished model
"""
import argparse
import json
import math
import os
import random
import time

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM,
                          MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast)

SPECIAL = ["<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>"]
BOS, END, SYSTEM, USER, ASSISTANT, PAD = range(6)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] | trim + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def read_corpus(folder):
    """Returns (list of raw documents, list of (user, assistant) pairs)."""
    plays = open(f"{folder}/tinyshakespeare.txt", encoding="utf-8").read()
    speeches = []
    for block in plays.split("\n\n"):
        speaker, _, text = block.strip().partition("\n")
        if speaker.endswith(":") and text:
            speeches.append(text.strip())
    pairs = [(a, b) for a, b in zip(speeches, speeches[1:]) if len(a) < 400 and 15 < len(b) < 500]
    novel = open(f"{folder}/war-and-peace.txt", encoding="utf-8-sig").read()
    paragraphs = [" ".join(p.split()) for p in novel.replace("\r", "").split("\n\n")]
    docs, current = [], ""
    for p in paragraphs:                      # pack paragraphs into documents of about 2 kB
        current += p + "\n\n"
        if len(current) > 2000:
            docs.append(current.strip())
            current = ""
    for i in range(0, len(plays), 2000):
        docs.append(plays[i:i + 2000])
    return docs, pairs


def train_tokenizer(docs, vocab_size):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(docs, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token=SPECIAL[BOS], eos_token=SPECIAL[END],
                                   pad_token=SPECIAL[PAD], chat_template=CHAT_TEMPLATE, model_max_length=1024)


def tokenize(tok, docs, pairs, seed):
    """One long id stream; documents and chat pairs in random order. Last 2 % is held out."""
    enc = lambda texts: tok._tokenizer.encode_batch(texts, add_special_tokens=False)
    items = [[BOS] + e.ids + [END] for e in enc(docs)]
    for u, a in zip(enc([p[0] for p in pairs]), enc([p[1] for p in pairs])):
        items.append([BOS, USER] + u.ids + [END, ASSISTANT] + a.ids + [END])
    random.Random(seed).shuffle(items)
    ids = torch.tensor([i for item in items for i in item])
    cut = int(len(ids) * 0.98)
    return ids[:cut], ids[cut:]


def build_model(arch, vocab_size):
    common = dict(vocab_size=vocab_size, max_position_embeddings=1024, bos_token_id=BOS, eos_token_id=END,
                  pad_token_id=PAD, tie_word_embeddings=False)
    if arch == "mixtral":
        return MixtralForCausalLM(MixtralConfig(
            hidden_size=256, intermediate_size=160, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4, head_dim=32, num_local_experts=8, num_experts_per_tok=2,
            router_aux_loss_coef=0.02, output_router_logits=True, sliding_window=None,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, **common))
    return DeepseekV3ForCausalLM(DeepseekV3Config(
        hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=8, n_routed_experts=8, n_shared_experts=1,
        num_experts_per_tok=2, n_group=4, topk_group=2, first_k_dense_replace=1, norm_topk_prob=True,
        routed_scaling_factor=1.0, q_lora_rank=None, kv_lora_rank=64, qk_rope_head_dim=16,
        qk_nope_head_dim=32, v_head_dim=32, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **common))


def balance_router_bias(model, rate=1e-3):
    """DeepSeek-V3's loss-free balancing: nudge e_score_correction_bias towards under-used experts."""
    for layer in model.model.layers:
        gate = getattr(layer.mlp, "gate", None)
        if gate is not None and hasattr(gate, "e_score_correction_bias") and gate.load is not None:
            gate.e_score_correction_bias.add_(rate * torch.sign(gate.load.mean() - gate.load))


def watch_router_load(model):
    for layer in model.model.layers:
        gate = getattr(layer.mlp, "gate", None)
        if gate is not None and hasattr(gate, "e_score_correction_bias"):
            gate.load = None

            def hook(module, args, output):          # (router logits, weights, chosen experts)
                module.load = torch.bincount(output[2].flatten(), minlength=module.num_experts).float()
            gate.register_forward_hook(hook)


@torch.no_grad()
def evaluate(model, ids, seq):
    model.eval()
    n = min(len(ids) // seq, 48)
    x = ids[:n * seq].view(n, seq)
    loss = sum(model(input_ids=c).logits[:, :-1].float().flatten(0, 1).log_softmax(-1)
               .gather(1, c[:, 1:].reshape(-1, 1)).mean().neg().item() * len(c) for c in x.split(16)) / n
    model.train()
    return loss


def save(model, tok, out):
    """bf16 copy in HF layout; the f32 master weights stay untouched."""
    master = {k: v.detach().clone() for k, v in model.state_dict().items()}
    model.to(torch.bfloat16).save_pretrained(out, safe_serialization=True)
    model.to(torch.float32).load_state_dict(master)
    tok.save_pretrained(out)
    with open(f"{out}/generation_config.json", "w") as f:
        json.dump({"bos_token_id": BOS, "eos_token_id": END, "pad_token_id": PAD,
                   "do_sample": True, "temperature": 0.8, "top_p": 0.95}, f, indent=2)


def sample(path):
    tok = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    torch.manual_seed(0)
    for text in ["ROMEO:\n", "The prince went into the room and", "First Citizen:\nBefore we proceed"]:
        ids = torch.tensor([[BOS] + tok(text)["input_ids"]])
        out = model.generate(ids, max_new_tokens=80, do_sample=True, temperature=0.7, top_p=0.9)
        print(f"--- {text!r}\n{tok.decode(out[0, 1:])}")
    for text in ["What say you of the king, my lord?", "I love thee.", "Where is my father?"]:
        ids = tok.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                      return_tensors="pt", return_dict=False)
        out = model.generate(ids, max_new_tokens=80, do_sample=True, temperature=0.7, top_p=0.9)
        print(f"--- chat: {text!r}\n{tok.decode(out[0, ids.shape[1]:])}")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--corpus", default="corpus")
    ap.add_argument("--out", default="demo")
    ap.add_argument("--arch", choices=["mixtral", "deepseek_v3"], default="mixtral")
    ap.add_argument("--steps", type=int, default=3000)
    ap.add_argument("--minutes", type=float, default=1e9, help="finish (with the learning rate annealed) by then; "
                    "a run stopped by this limit is not reproducible bit for bit")
    ap.add_argument("--batch", type=int, default=16)
    ap.add_argument("--seq", type=int, default=128)
    ap.add_argument("--vocab", type=int, default=2048)
    ap.add_argument("--lr", type=float, default=3e-3)
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--bf16", action="store_true", help="compute in bf16 autocast instead of f32")
    ap.add_argument("--sample", metavar="DIR", help="only print samples of a trained model")
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    if a.sample:
        return sample(a.sample)
    torch.manual_seed(a.seed)
    docs, pairs = read_corpus(a.corpus)
    tok = train_tokenizer(docs, a.vocab)
    train_ids, val_ids = tokenize(tok, docs, pairs, a.seed)
    model = build_model(a.arch, a.vocab)
    watch_router_load(model)
    print(f"{len(docs)} documents, {len(pairs)} chat pairs, {len(train_ids)} training tokens; "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    opt = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                            lr=a.lr, betas=(0.9, 0.98), fused=True)
    model.train()
    start = time.time()
    for step in range(a.steps):
        progress = max(step / a.steps, (time.time() - start) / (60 * a.minutes))
        last = step == a.steps - 1 or progress >= 1
        lr = a.lr * min((step + 1) / 100, 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(progress, 1))))
        for g in opt.param_groups:
            g["lr"] = lr
        rows = torch.randint(0, len(train_ids) - a.seq, (a.batch,))
        x = torch.stack([train_ids[r:r + a.seq] for r in rows.tolist()])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=a.bf16):
            loss = model(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        with torch.no_grad():
            balance_router_bias(model)
        if step % 50 == 0 or last:
            done = time.time() - start
            print(f"step {step} loss {loss.item():.3f} lr {lr:.1e} {done:.0f} s "
                  f"{(step + 1) * a.batch * a.seq / done:.0f} tok/s", flush=True)
        if step and step % 250 == 0 or last:
            print(f"step {step} held-out loss {evaluate(model, val_ids, a.seq):.3f}", flush=True)
            save(model, tok, a.out)
        if last:
            break
    sample(a.out)


if __name__ == "__main__":
    main()
