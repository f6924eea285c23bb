"""The official client against a running baton: python3 openai_client.py URL

Fails with a traceback if anything is not as the client's own types promise.
"""

import sys

import openai

url = sys.argv[1]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60)

models = [model.id for model in client.models.list()]
assert models == ["baton-demo"], models

question = dict(
    model=models[0],
    messages=[
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "my code is 7341. what is my code?"},
    ],
    temperature=0,
    seed=1,
    max_completion_tokens=16,
)

whole = client.chat.completions.create(**question)
assert whole.object == "chat.completion" and whole.id and whole.created > 0, whole
assert whole.choices[0].message.role == "assistant", whole
assert whole.choices[0].finish_reason in ("stop", "length"), whole
assert 1 <= whole.usage.completion_tokens <= 16, whole.usage
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens, whole.usage
assert whole.usage.prompt_tokens_details.cached_tokens >= 0, whole.usage

text, usage, finish, ids = "", None, None, set()
for chunk in client.chat.completions.create(**question, stream=True, stream_options={"include_usage": True}):
    assert chunk.object == "chat.completion.chunk", chunk
    ids.add(chunk.id)
    if chunk.usage is not None:
        assert usage is None and not chunk.choices, chunk
        usage = chunk.usage
    for choice in chunk.choices:
        text += choice.delta.content or ""
        finish = choice.finish_reason or finish
assert text == (whole.choices[0].message.content or ""), (text, whole)
assert finish == whole.choices[0].finish_reason and len(ids) == 1, (finish, ids)
assert usage.completion_tokens == whole.usage.completion_tokens, (usage, whole.usage)
assert usage.prompt_tokens == whole.usage.prompt_tokens, (usage, whole.usage)

stopped = client.chat.completions.create(**{**question, "stop": ["a", "e", "7", " "]})
assert not any(stop in (stopped.choices[0].message.content or "") for stop in ["a", "e", "7", " "]), stopped

for wrong, expected in [
    (dict(question, model="no-such-model"), openai.NotFoundError),
    (dict(question, messages=[]), openai.BadRequestError),
    (dict(question, max_completion_tokens=0), openai.BadRequestError),
]:
    try:
        client.chat.completions.create(**wrong)
        raise SystemExit(f"was taken: {wrong}")
    except expected as error:
        assert error.message and error.type, error

print("ok", openai.__version__)
