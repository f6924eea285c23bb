"""Anthropic's official client against a running baton: python3 anthropic_client.py URL

Fails with a traceback if anything is not as the client's own types promise.
"""

import sys

import anthropic

url = sys.argv[1]
client = anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0, timeout=60)

question = dict(
    model="baton-demo",
    max_tokens=16,
    # Newer versions of the package do not know it any more; the API does.
    extra_body={"temperature": 0},
    system="You are a helpful assistant.",
    messages=[{"role": "user", "content": "my code is 7341. what is my code?"}],
)

whole = client.messages.create(**question)
assert whole.type == "message" and whole.role == "assistant" and whole.id.startswith("msg_"), whole
assert whole.stop_reason in ("end_turn", "max_tokens"), whole
assert 1 <= whole.usage.output_tokens <= 16, whole.usage
text = "".join(block.text for block in whole.content if block.type == "text")
assert text, whole

counted = client.messages.count_tokens(**{k: question[k] for k in ("model", "system", "messages")})
used = whole.usage
assert counted.input_tokens == used.input_tokens + used.cache_read_input_tokens, (counted, used)

# Greedy: the stream says the same, and the client puts it together to the same message.
with client.messages.stream(**question) as stream:
    streamed = "".join(stream.text_stream)
    final = stream.get_final_message()
assert streamed == text, (streamed, text)
assert final.stop_reason == whole.stop_reason and final.usage.output_tokens == whole.usage.output_tokens, final
names = [event.type for event in client.messages.create(**question, stream=True)]
assert names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"], names

# A call, its result, and the answer to it.
tool = {
    "name": "lookup",
    "description": "Looks a code up.",
    "input_schema": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
}
turns = [
    {"role": "user", "content": "what is my code?"},
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "I will look."},
            {"type": "tool_use", "id": "toolu_1", "name": "lookup", "input": {"name": "me"}},
        ],
    },
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "7341"}]},
]
answer = client.messages.create(
    model="baton-demo", max_tokens=8, extra_body={"temperature": 0}, tools=[tool], tool_choice={"type": "auto"}, messages=turns
)
assert answer.usage.output_tokens >= 1, answer

stopped = client.messages.create(**question, stop_sequences=[text[1:3]])
assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == text[1:3], stopped

for wrong, kind in [
    (dict(question, model="nope"), anthropic.NotFoundError),
    (dict(question, max_tokens=10_000_000), anthropic.BadRequestError),
    (
        dict(question, messages=[{"role": "user", "content": [
            {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1:1/x.png"}}]}]),
        anthropic.BadRequestError,
    ),
]:
    try:
        client.messages.create(**wrong)
    except kind as error:
        assert error.body["error"]["type"] in ("not_found_error", "invalid_request_error"), error.body
        assert error.request_id, error
    else:
        raise AssertionError(f"taken: {wrong}")
