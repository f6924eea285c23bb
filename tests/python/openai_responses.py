"""The official client's responses against a running baton: python3 openai_responses.py URL

Fails with a traceback if anything is not as the client's own types promise.
"""

import sys
import time

import openai
from pydantic import BaseModel

url = sys.argv[1]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60)
model = client.models.list().data[0].id
asked = dict(model=model, input="my code is 7341. what is my code?", temperature=0, max_output_tokens=16)

# Whole, and streamed: the same.
whole = client.responses.create(**asked, instructions="You are a helpful assistant.", metadata={"a": "b"})
assert whole.object == "response" and whole.id.startswith("resp_"), whole
assert whole.status in ("completed", "incomplete") and whole.metadata == {"a": "b"}, whole
assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens, whole.usage
assert client.responses.retrieve(whole.id) == whole

text, kinds = "", []
for number, event in enumerate(client.responses.create(**asked, instructions="You are a helpful assistant.", stream=True)):
    assert event.sequence_number == number, event
    kinds.append(event.type)
    if event.type == "response.output_text.delta":
        text += event.delta
assert text == whole.output_text, (text, whole)
assert kinds[:2] == ["response.created", "response.in_progress"], kinds
assert kinds[-1] == f"response.{whole.status}", kinds
assert event.response.output_text == text

with client.responses.stream(**asked) as stream:
    for event in stream:
        pass
    final = stream.get_final_response()
assert final.status in ("completed", "incomplete"), final

# One follows the other.
second = client.responses.create(
    **{**asked, "input": "and again?"}, previous_response_id=whole.id, include=["message.output_text.logprobs"]
)
items = list(client.responses.input_items.list(second.id, order="asc", limit=2))
assert [item.type for item in items] == ["message"] * 3, items
assert items[2].content[0].type == "input_text" and items[2].content[0].text == "and again?", items
assert second.usage.input_tokens > whole.usage.output_tokens, second.usage
if second.output_text:
    assert second.output[0].content[0].logprobs, second

# A schema, parsed.
class Answer(BaseModel):
    yes: bool

parsed = client.responses.parse(model=model, input="yes or no?", text_format=Answer, temperature=0, max_output_tokens=400)
assert parsed.status == "completed" and isinstance(parsed.output_parsed, Answer), parsed

# A tool, there and back.
tool = {
    "type": "function",
    "name": "answer",
    "description": "Gives the answer.",
    "parameters": {
        "type": "object",
        "properties": {"yes": {"type": "boolean"}},
        "required": ["yes"],
        "additionalProperties": False,
    },
    "strict": True,
}
called = client.responses.create(
    model=model, input="call answer", tools=[tool], tool_choice="required", temperature=0, max_output_tokens=96
)
calls = [item for item in called.output if item.type == "function_call"]
assert calls and calls[0].name == "answer", called
if called.status == "completed":
    result = {"type": "function_call_output", "call_id": calls[0].call_id, "output": "true"}
    results = [{**result, "call_id": call.call_id} for call in calls]
    after = client.responses.create(
        model=model, input=results, tools=[tool], previous_response_id=called.id, max_output_tokens=8
    )
    assert after.previous_response_id == called.id, after
    # The same without anything stored: the items go back as they came.
    again = [{"role": "user", "content": "call answer"}, *called.output, *results]
    client.responses.create(model=model, input=again, tools=[tool], store=False, max_output_tokens=8)

# In the background: polled, streamed again, cancelled.
def ended(response):
    until = time.monotonic() + 60
    while response.status in ("queued", "in_progress"):
        assert time.monotonic() < until, response
        time.sleep(0.05)
        response = client.responses.retrieve(response.id)
    return response

polled = ended(client.responses.create(**asked, instructions="You are a helpful assistant.", background=True))
assert polled.output_text == whole.output_text and polled.background, polled

events = list(client.responses.create(**asked, background=True, stream=True))
assert events[-1].type in ("response.completed", "response.incomplete"), events[-1]
rest = list(client.responses.retrieve(events[0].response.id, stream=True, starting_after=2))
assert [event.sequence_number for event in rest] == list(range(3, len(events))), rest
assert rest[-1] == events[-1]

long = client.responses.create(
    **{**asked, "max_output_tokens": 400}, background=True, extra_body={"ignore_eos": True}
)
cancelled = client.responses.cancel(long.id)
assert cancelled.status in ("cancelled", "incomplete"), cancelled
assert ended(long).status == cancelled.status

# Tokens, deletion, errors.
counted = client.responses.input_tokens.count(model=model, input=asked["input"], instructions="You are a helpful assistant.")
assert counted.input_tokens == whole.usage.input_tokens, (counted, whole.usage)
client.responses.delete(whole.id)
for wrong, expected in [
    (lambda: client.responses.retrieve(whole.id), openai.NotFoundError),
    (lambda: client.responses.create(**asked, previous_response_id=whole.id), openai.BadRequestError),
    (lambda: client.responses.create(**{**asked, "model": "no-such-model"}), openai.NotFoundError),
    (lambda: client.responses.create(**asked, tools=[{"type": "web_search"}]), openai.BadRequestError),
    (lambda: client.responses.create(**asked, truncation="auto"), openai.BadRequestError),
    (lambda: client.responses.create(**asked, conversation="conv_1"), openai.BadRequestError),
]:
    try:
        wrong()
        raise SystemExit(f"was taken: {expected}")
    except expected:
        pass
