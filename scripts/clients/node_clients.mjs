// openai-node and the AI SDK. What is tried is told as in tried.py.

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, Output, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";
import { z } from "zod";

const URL = process.env.SERVER_URL, SCRIPTED = process.env.SCRIPTED_URL, KEY = "secret", MODEL = "default";
const QUESTION = "Tom has 12 apples. Tom buys 30 more apples. How many apples does Tom have now?";
const PARAMETERS = {
  type: "object",
  properties: { city: { enum: ["Rome", "Oslo"] }, days: { type: "integer", minimum: 1, maximum: 9 } },
  required: ["city", "days"],
  additionalProperties: false,
};
const TOOLS = ["weather", "clock"].map(name => ({ type: "function", function: { name, description: "Told.", parameters: PARAMETERS } }));
const DEADLINE_MS = 90_000;

let failed = false;
const tried = async (client, what, run) => {
  let result = "passed", detail = "";
  try {
    await Promise.race([run(), new Promise((_, late) => setTimeout(late, DEADLINE_MS, new Error("no end")).unref())]);
  } catch (error) {
    [result, detail, failed] = ["failed", String(error.stack ?? error).slice(-1500), true];
  }
  console.log(JSON.stringify({ client, tried: what, result, detail }));
};
const check = (holds, shown) => { if (!holds) throw new Error(`not as asked: ${JSON.stringify(shown)}`); };
const rejects = async (promise, status) => {
  const error = await promise.then(() => null, error => error);
  check(error?.status === status || error?.statusCode === status, String(error));
};

const at = (url, apiKey = KEY) => new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0 });
const openai = at(URL), ask = { model: MODEL, messages: [{ role: "user", content: QUESTION }], temperature: 0 };

await tried("openai-node", "chat", async () => {
  const answer = await openai.chat.completions.create(ask);
  check(answer.choices[0].message.content.includes("42"), answer);
});
await tried("openai-node", "chat, streamed, with usage", async () => {
  let text = "", usage = null;
  for await (const chunk of await openai.chat.completions.create({ ...ask, stream: true, stream_options: { include_usage: true } })) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  check(text.includes("42") && usage.completion_tokens > 0, text);
});
await tried("openai-node", "JSON schema", async () => {
  const form = { type: "json_schema", json_schema: { name: "asked", strict: true, schema: PARAMETERS } };
  const answer = await openai.chat.completions.create({ ...ask, response_format: form });
  check(PARAMETERS.properties.city.enum.includes(JSON.parse(answer.choices[0].message.content).city), answer);
});
await tried("openai-node", "tools, named and required", async () => {
  for (const tool_choice of [{ type: "function", function: { name: "clock" } }, "required"]) {
    const answer = await openai.chat.completions.create({ ...ask, tools: TOOLS, tool_choice, parallel_tool_calls: false });
    check(JSON.parse(answer.choices[0].message.tool_calls[0].function.arguments).days > 0, answer);
  }
});
await tried("openai-node", "tools, auto, two calls at once, streamed", async () => {
  const final = await at(SCRIPTED).chat.completions.stream({ ...ask, tools: TOOLS }).finalChatCompletion();
  check(final.choices[0].message.tool_calls.map(call => call.function.name).join() === "weather,clock", final);
});
await tried("openai-node", "tools run by the client (runTools)", async () => {
  let called = 0;
  const run = at(SCRIPTED).chat.completions.runTools(
    { ...ask, tools: TOOLS.map(({ type, function: told }) => ({ type, function: { ...told, parse: JSON.parse, function: () => (called++, "fine") } })) },
    { maxChatCompletions: 2 },
  );
  await run.done().catch(() => null);
  check(called >= 2, called);
});
await tried("openai-node", "responses, whole and streamed", async () => {
  const whole = await openai.responses.create({ model: MODEL, input: QUESTION, temperature: 0 });
  check(whole.output_text.includes("42"), whole);
  const final = await openai.responses.stream({ model: MODEL, input: QUESTION, temperature: 0 }).finalResponse();
  check(final.output_text === whole.output_text, final);
});
await tried("openai-node", "errors: bad key, unknown model, too long", async () => {
  await rejects(at(URL, "wrong").models.list(), 401);
  await rejects(openai.chat.completions.create({ ...ask, model: "nobody" }), 404);
  await rejects(openai.chat.completions.create({ ...ask, messages: [{ role: "user", content: QUESTION.repeat(200) }] }), 400);
});
await tried("openai-node", "abort in mid-stream", async () => {
  const stream = await openai.chat.completions.create({ ...ask, stream: true, max_tokens: 900, ignore_eos: true });
  for await (const chunk of stream) if (chunk.choices.length) stream.controller.abort();
  check(stream.controller.signal.aborted, null);
});

const compatible = url => createOpenAICompatible({ name: "ours", baseURL: `${url}/v1`, apiKey: KEY, supportsStructuredOutputs: true })(MODEL);
const common = { model: compatible(URL), prompt: QUESTION, temperature: 0, maxRetries: 0 };
const inputSchema = jsonSchema(PARAMETERS);
const weather = { weather: tool({ description: "Told.", inputSchema }) };
const answered = { weather: tool({ description: "Told.", inputSchema, execute: async () => "fine" }), clock: tool({ description: "Told.", inputSchema, execute: async () => "noon" }) };

await tried("AI SDK", "generateText", async () => {
  const { text } = await generateText(common);
  check(text.includes("42"), text);
});
await tried("AI SDK", "streamText", async () => {
  let text = "";
  for await (const piece of streamText(common).textStream) text += piece;
  check(text.includes("42"), text);
});
await tried("AI SDK", "output of a type", async () => {
  const schema = z.strictObject({ owner: z.enum(["Tom", "Anna"]), apples: z.literal([12, 30, 42]) });
  const { output } = await generateText({ ...common, output: Output.object({ schema }) });
  check(["Tom", "Anna"].includes(output.owner), output);
});
await tried("AI SDK", "tools, required and named", async () => {
  for (const toolChoice of ["required", { type: "tool", toolName: "weather" }]) {
    const { toolCalls } = await generateText({ ...common, tools: weather, toolChoice, maxOutputTokens: 400, providerOptions: { ours: { parallel_tool_calls: false } } });
    check(toolCalls[0]?.input.days > 0, toolCalls);
  }
});
await tried("AI SDK", "tools, auto, two calls at once, streamed, with their results", async () => {
  const run = streamText({ ...common, model: compatible(SCRIPTED), tools: answered, stopWhen: stepCountIs(2) });
  const steps = await run.steps;
  check(steps[0].toolCalls.length === 2 && steps[0].toolResults.length === 2 && steps.length === 2, steps.length);
});
await tried("AI SDK", "responses (its OpenAI provider), whole and streamed", async () => {
  const model = createOpenAI({ baseURL: `${URL}/v1`, apiKey: KEY })(MODEL);
  const { text } = await generateText({ ...common, model });
  check(text.includes("42"), text);
  let streamed = "";
  for await (const piece of streamText({ ...common, model }).textStream) streamed += piece;
  check(streamed === text, streamed);
});
await tried("AI SDK", "error: bad key", async () => {
  const model = createOpenAICompatible({ name: "ours", baseURL: `${URL}/v1`, apiKey: "wrong" })(MODEL);
  await rejects(generateText({ ...common, model }), 401);
});
process.exit(failed ? 1 : 0);
