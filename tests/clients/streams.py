#!/usr/bin/env python3
"""Keeps 32 streams open against a running server for a minute and checks every one of them.

    phalanx demo &
    python tests/clients/streams.py [http://127.0.0.1:8000] [--streams 32] [--seconds 60]

Mixed lengths, greedy and seeded, chat and completions; one in ten is left half-way. Every other
stream must end with [DONE] and a finish reason; a repeated request must give the same bytes; when
all is idle no KV block may be in use and the engine's books must be whole. Standard library only.
"""
import argparse
import http.client
import json
import random
import re
import threading
import time
import urllib.parse
import urllib.request

ap = argparse.ArgumentParser()
ap.add_argument("base", nargs="?", default="http://127.0.0.1:8000")
ap.add_argument("--streams", type=int, default=32)
ap.add_argument("--seconds", type=float, default=60)
a = ap.parse_args()
host = urllib.parse.urlparse(a.base).netloc
model = json.load(urllib.request.urlopen(a.base + "/v1/models"))["data"][0]["id"]
lock, seen, counts, errors = threading.Lock(), {}, {"done": 0, "left": 0, "tokens": 0}, []
PROMPTS = ["The king said", "O Romeo,", "Prince Andrew", "What is", "I will not", "It was in July", "My lord"]


def one(rng):
    chat, prompt = rng.random() < 0.4, rng.choice(PROMPTS)
    body = {"model": model, "stream": True, "max_tokens": rng.choice([4, 30, 120, 300]), "seed": rng.randrange(3),
            "temperature": rng.choice([0, 0.8]), "stream_options": {"include_usage": True}}
    body.update({"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt, "ignore_eos": True})
    leave = rng.random() < 0.1
    connection = http.client.HTTPConnection(host, timeout=120)
    connection.request("POST", "/v1/chat/completions" if chat else "/v1/completions", json.dumps(body),
                       {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {response.read()[:200]}")
    text, finish, usage = "", None, None
    for line in response:
        line = line.decode().strip()
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            break
        chunk = json.loads(line[6:])
        if "error" in chunk:
            raise RuntimeError(line)
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            text += (choice["delta"].get("content") or "") if chat else choice["text"]
            finish = choice["finish_reason"] or finish
        if leave and text:
            connection.close()
            with lock:
                counts["left"] += 1
            return
    else:
        raise RuntimeError("the stream ended without [DONE]")
    connection.close()
    if not finish or not usage:
        raise RuntimeError("no finish reason or no usage")
    with lock:
        counts["done"] += 1
        counts["tokens"] += usage["completion_tokens"]
        if seen.setdefault(json.dumps(body), text) != text:
            raise RuntimeError(f"the same request gave other bytes: {body}")


def client(number):
    rng = random.Random(number)
    while time.time() < end:
        try:
            one(rng)
        except Exception as error:  # every failure counts, whatever it is
            with lock:
                errors.append(repr(error))


def metric(name):
    text = urllib.request.urlopen(a.base + "/metrics").read().decode()
    return sum(float(v) for v in re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.M))


end = time.time() + a.seconds
threads = [threading.Thread(target=client, args=(n,)) for n in range(a.streams)]
[t.start() for t in threads]
[t.join() for t in threads]
time.sleep(0.5)
used, whole = metric("phalanx_kv_blocks_used"), metric("phalanx_integrity")
print(f"{counts['done']} streams ended, {counts['left']} were left, {counts['tokens']} tokens, "
      f"{counts['tokens'] / a.seconds:.0f} tokens per second, {len(errors)} errors; "
      f"idle: {used:.0f} blocks used, books whole: {whole == 1}")
for error in errors[:5]:
    print("  " + error)
raise SystemExit(bool(errors) or used != 0 or whole != 1)
