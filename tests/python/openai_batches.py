"""The official client's files and batches against a running baton: python3 openai_batches.py URL"""

import json
import sys
import time

import openai

url = sys.argv[1]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60)


def line(name, **body):
    body = {"model": "baton-demo", "messages": [{"role": "user", "content": f"Hi {name}"}], "max_completion_tokens": 4, **body}
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body})


requests = "\n".join([line(f"r{n}") for n in range(6)] + [line("bad", model="no-such-model")])
file = client.files.create(file=("requests.jsonl", requests.encode()), purpose="batch", expires_after={"anchor": "created_at", "seconds": 7200})
assert file.object == "file" and file.bytes == len(requests) and file.filename == "requests.jsonl", file
assert file.expires_at - file.created_at == 7200, file
assert client.files.retrieve(file.id) == file
assert client.files.content(file.id).read() == requests.encode()
assert [found.id for found in client.files.list(purpose="batch", limit=1)][0] == file.id

batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"a": "b"})
assert batch.object == "batch" and batch.status in ("validating", "in_progress") and batch.metadata == {"a": "b"}, batch
deadline = time.time() + 60
while batch.status not in ("completed", "failed", "expired", "cancelled"):
    assert time.time() < deadline, batch
    time.sleep(0.1)
    batch = client.batches.retrieve(batch.id)
assert batch.status == "completed", batch
assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (7, 6, 1), batch
answers = [json.loads(text) for text in client.files.content(batch.output_file_id).text.splitlines()]
assert sorted(answer["custom_id"] for answer in answers) == [f"r{n}" for n in range(6)], answers
completions = [openai.types.chat.ChatCompletion.model_validate(answer["response"]["body"]) for answer in answers]
assert sum(completion.usage.completion_tokens for completion in completions) == batch.usage.output_tokens, batch
(error,) = [json.loads(text) for text in client.files.content(batch.error_file_id).text.splitlines()]
assert error["custom_id"] == "bad" and error["response"]["status_code"] == 404, error
assert client.batches.list(limit=1).data[0].id == batch.id
try:
    client.batches.cancel(batch.id)
    raise SystemExit("a batch that is over was cancelled")
except openai.ConflictError as error:
    assert error.message, error
assert client.files.delete(file.id).deleted
try:
    client.files.retrieve(file.id)
    raise SystemExit("a deleted file is still there")
except openai.NotFoundError as error:
    assert error.type == "invalid_request_error", error

print("ok", openai.__version__)
