#!/usr/bin/env python3
"""Drives a running server with the official `openai` Python client.

    pip install openai
    phalanx demo &                       # or: phalanx serve models/demo
    python tests/clients/openai_client.py [http://127.0.0.1:8000]

Lists models, completes, chats, streams with usage, reads logprobs, meets errors, and leaves a
stream open half-way: its KV blocks must be free within a step or two. Exit status 0: all held.
"""
import re
import sys
import time
import urllib.request

import openai

BASE = (sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000").rstrip("/")
client = openai.OpenAI(base_url=BASE + "/v1", api_key="none", max_retries=0)


def metric(name):
    text = urllib.request.urlopen(BASE + "/metrics").read().decode()
    return sum(float(v) for v in re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.M))


def check(what, holds):
    print(("ok    " if holds else "FAIL  ") + what)
    if not holds:
        sys.exit(1)


models = client.models.list()
model = models.data[0].id
check(f"models.list: {model}", client.models.retrieve(model).id == model)

done = client.completions.create(model=model, prompt="The king", max_tokens=8, temperature=0, logprobs=3)
choice = done.choices[0]
check(f"completions: {choice.text!r}", choice.finish_reason in ("stop", "length"))
check("completions: usage adds up", done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens)
check("completions: logprobs", len(choice.logprobs.token_logprobs) == done.usage.completion_tokens
      and all(len(top) >= 3 for top in choice.logprobs.top_logprobs))

batch = client.completions.create(model=model, prompt=["One", "Two"], n=2, max_tokens=4, seed=1)
check("completions: batch of two with n=2", [c.index for c in batch.choices] == [0, 1, 2, 3])

messages = [{"role": "user", "content": "Who goes there?"}]
chat = client.chat.completions.create(model=model, messages=messages, max_tokens=24, seed=7,
                                      logprobs=True, top_logprobs=5)
answer = chat.choices[0]
check(f"chat: {answer.message.content!r}", answer.message.role == "assistant")
check("chat: logprobs", all(len(t.top_logprobs) == 5 and t.logprob <= 0 for t in answer.logprobs.content))

text, usage, finish, roles = "", None, None, []
stream = client.chat.completions.create(model=model, messages=messages, max_tokens=24, seed=7, stream=True,
                                        stream_options={"include_usage": True})
for chunk in stream:
    if chunk.usage:
        usage = chunk.usage
        check("stream: usage comes last and alone", not chunk.choices)
        continue
    delta = chunk.choices[0]
    roles.append(delta.delta.role)
    text += delta.delta.content or ""
    finish = delta.finish_reason or finish
check("stream: the same answer as unstreamed", text == answer.message.content and finish == answer.finish_reason)
check("stream: usage equal, role first", usage == chat.usage and roles[0] == "assistant")

for what, call, error in [
    ("an unknown model", lambda: client.completions.create(model="gpt-9", prompt="x"), openai.NotFoundError),
    ("an empty prompt", lambda: client.completions.create(model=model, prompt=[]), openai.BadRequestError),
    ("a negative max_tokens", lambda: client.completions.create(model=model, prompt="x", max_tokens=-1), openai.BadRequestError),
    ("a body of 10 MB", lambda: client.completions.create(model=model, prompt="x" * 10_000_000), openai.APIStatusError),
]:
    try:
        call()
        check(f"{what} is refused", False)
    except error as e:
        check(f"{what} is refused: {e.status_code} {e.body and e.body.get('code')}", True)

stream = client.completions.create(model=model, prompt="Once", max_tokens=900, temperature=0, stream=True,
                                   extra_body={"ignore_eos": True})
next(iter(stream))
before = metric("phalanx_steps_total")
stream.close()
left = time.time()
while metric("phalanx_kv_blocks_used") > 0 and time.time() - left < 10:
    time.sleep(0.001)
steps = metric("phalanx_steps_total") - before
check(f"a closed stream freed its blocks after {1e3 * (time.time() - left):.0f} ms, {steps:.0f} steps", steps < 100)
