"""OpenAI's official client and the older completions: python3 openai_completions.py URL

Fails with a traceback if anything is not as the client's own types promise.
"""

import sys

import openai

url = sys.argv[1]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60)
question = dict(model="baton-demo", prompt=["my code is", "the code is"], temperature=0, max_tokens=8)

whole = client.completions.create(**question, n=2)
assert whole.object == "text_completion" and whole.id.startswith("cmpl-"), whole
assert [choice.index for choice in whole.choices] == [0, 1, 2, 3], whole
assert whole.choices[0].text == whole.choices[1].text, "greedy choices of one prompt"
assert whole.usage.completion_tokens <= 32, whole.usage

texts, usage = ["", ""], None
for chunk in client.completions.create(**question, stream=True, stream_options={"include_usage": True}):
    if chunk.usage is not None:
        assert usage is None and not chunk.choices, chunk
        usage = chunk.usage
    for choice in chunk.choices:
        texts[choice.index] += choice.text
assert texts == [whole.choices[0].text, whole.choices[2].text], (texts, whole)
assert usage.prompt_tokens == whole.usage.prompt_tokens, (usage, whole.usage)

# Token ids say the same as their text, and the echo is the text.
tokens = openai.OpenAI(base_url=url, api_key="unused").post("/tokenize", cast_to=object, body={"prompt": "my code is"})["tokens"]
echoed = client.completions.create(model="baton-demo", prompt=tokens, temperature=0, max_tokens=8, echo=True)
assert echoed.choices[0].text == "my code is" + texts[0], echoed

for wrong in [dict(suffix="x"), dict(best_of=3), dict(extra_body={"odd": 1})]:
    try:
        client.completions.create(**question, **wrong)
    except openai.BadRequestError as error:
        assert error.param in ("suffix", "best_of", "odd"), error
    else:
        raise AssertionError(f"taken: {wrong}")
