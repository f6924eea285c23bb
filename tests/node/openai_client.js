// OpenAI's official Node package against a running baton: node openai_client.js URL
// Fails with a stack if anything is not as it should be.

const assert = require('node:assert');
const OpenAI = require('openai');

async function main(url) {
  const Client = OpenAI.OpenAI ?? OpenAI.default ?? OpenAI;
  const client = new Client({ baseURL: `${url}/v1`, apiKey: 'unused', maxRetries: 0, timeout: 60_000 });
  const question = {
    model: 'baton-demo',
    messages: [{ role: 'user', content: 'my code is 7341. what is my code?' }],
    temperature: 0,
    max_completion_tokens: 16,
  };

  const models = await client.models.list();
  assert.strictEqual(models.data[0].id, 'baton-demo');

  const whole = await client.chat.completions.create(question);
  assert.strictEqual(whole.object, 'chat.completion');
  const text = whole.choices[0].message.content;
  assert.ok(text.length > 0);

  let streamed = '';
  let usage = null;
  const stream = await client.chat.completions.create({
    ...question,
    stream: true,
    stream_options: { include_usage: true },
  });
  for await (const chunk of stream) {
    streamed += chunk.choices[0]?.delta?.content ?? '';
    usage = chunk.usage ?? usage;
  }
  assert.strictEqual(streamed, text);
  assert.strictEqual(usage.completion_tokens, whole.usage.completion_tokens);

  const completion = await client.completions.create({ model: 'baton-demo', prompt: 'my code', max_tokens: 4 });
  assert.strictEqual(completion.object, 'text_completion');

  await assert.rejects(client.chat.completions.create({ ...question, model: 'nope' }), (error) => error.status === 404);
  await assert.rejects(
    client.completions.create({ model: 'baton-demo', prompt: 'x', suffix: 'y' }),
    (error) => error.status === 400 && error.param === 'suffix',
  );
}

main(process.argv[2]).catch((error) => {
  console.error(error);
  process.exit(1);
});
