"""The official client against a running baton: python3 openai_client.py URL

Fails with a traceback if anything is not as the client's own types promise.
"""

import json
import re
import sys
import typing

import openai
import pydantic

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


# Tools: a forced call is valid whatever the model knows, and its result can be sent back.
tool = {
    "type": "function",
    "function": {
        "name": "convert",
        "description": "Converts a temperature.",
        "parameters": {
            "type": "object",
            "properties": {"unit": {"enum": ["c", "f"]}, "exact": {"type": "boolean"}},
            "required": ["unit", "exact"],
            "additionalProperties": False,
        },
    },
}
ask = dict(model=models[0], messages=[{"role": "user", "content": "is it warm?"}], max_completion_tokens=900, seed=3)
for choice in ["required", {"type": "function", "function": {"name": "convert"}}]:
    called = client.chat.completions.create(**ask, tools=[tool], tool_choice=choice, parallel_tool_calls=False)
    message = called.choices[0].message
    assert called.choices[0].finish_reason == "tool_calls" and len(message.tool_calls) == 1, called
    call = message.tool_calls[0]
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "convert" and arguments["unit"] in ("c", "f"), call
    assert isinstance(arguments["exact"], bool), call
    back = client.chat.completions.create(
        model=models[0],
        max_completion_tokens=8,
        tools=[tool],
        messages=[
            *ask["messages"],
            message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"},
        ],
    )
    assert back.choices[0].finish_reason in ("stop", "length", "tool_calls"), back

    name, streamed, reason = None, "", None
    for chunk in client.chat.completions.create(
        **ask, tools=[tool], tool_choice=choice, parallel_tool_calls=False, stream=True
    ):
        for part in chunk.choices:
            for delta in part.delta.tool_calls or []:
                name = delta.function.name or name
                streamed += delta.function.arguments or ""
            reason = part.finish_reason or reason
    assert (name, json.loads(streamed), reason) == ("convert", arguments, "tool_calls"), (name, streamed, reason)


# A pydantic class in and out.
class Verdict(pydantic.BaseModel):
    warm: bool
    scale: typing.Literal["c", "f"]


parsed = client.chat.completions.parse(**ask, response_format=Verdict)
assert isinstance(parsed.choices[0].message.parsed, Verdict), parsed
picked = client.chat.completions.create(**ask, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
assert picked.choices[0].message.content in ("yes", "no"), picked
matched = client.chat.completions.create(**ask, extra_body={"guided_regex": "[a-c]{3}"})
assert re.fullmatch("[a-c]{3}", matched.choices[0].message.content), matched

# Probabilities, and several choices.
told = client.chat.completions.create(**question, logprobs=True, top_logprobs=2)
content = told.choices[0].logprobs.content
assert b"".join(bytes(one.bytes) for one in content).decode() == told.choices[0].message.content, told
assert all(len(one.top_logprobs) == 2 and one.logprob <= one.top_logprobs[0].logprob for one in content), told
several = client.chat.completions.create(**{**question, "temperature": 1, "n": 2})
assert [choice.index for choice in several.choices] == [0, 1], several
alone = client.chat.completions.create(**{**question, "temperature": 1, "seed": question["seed"] + 1})
assert several.choices[1].message.content == alone.choices[0].message.content, (several, alone)
biased = client.chat.completions.create(**question, logit_bias={"2": 100})
assert biased.usage.completion_tokens == 1, biased

try:
    client.chat.completions.create(**ask, tools=[tool], tool_choice={"type": "function", "function": {"name": "other"}})
    raise SystemExit("an unknown function was taken")
except openai.BadRequestError as error:
    assert error.param == "tool_choice", error

print("ok", openai.__version__)
