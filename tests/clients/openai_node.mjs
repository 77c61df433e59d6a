// What OpenAI's own client for Node asks of the server; `test_frameworks.py` runs this.
import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "x", maxRetries: 0 });
const model = "SmolLM2-135M-Instruct";
const city = z.object({ name: z.string().max(20), inhabitants: z.number().int() });
const settings = { model, temperature: 0, max_tokens: 300 };
const ask = (content) => [{ role: "user", content }];

function check(condition, what) {
  if (!condition) throw new Error(what);
}

const cases = {
  async parse() {
    const format = zodResponseFormat(city, "city");
    const found = await client.chat.completions.parse({ ...settings, messages: ask("Paris"), response_format: format });
    check(typeof found.choices[0].message.parsed.name === "string", JSON.stringify(found));
  },
  async runTools() {
    const called = [];
    const add = zodFunction({
      name: "add",
      description: "Add two numbers.",
      parameters: z.object({ a: z.number().int(), b: z.number().int() }),
      function: ({ a, b }) => {
        called.push([a, b]);
        return String(a + b);
      },
    });
    for (const stream of [false, true]) {
      const before = called.length;
      const tool_choice = { type: "function", function: { name: "add" } };
      const runner = client.chat.completions.runTools(
        { ...settings, stream, messages: ask("Add 2 and 3"), tools: [add], tool_choice, parallel_tool_calls: false },
        { maxChatCompletions: 2 },
      );
      await runner.done();
      check(called.length > before, "not called");
    }
  },
  async responses() {
    const request = { model, temperature: 0, max_output_tokens: 300 };
    const text = { format: zodTextFormat(city, "city") };
    const found = await client.responses.parse({ ...request, input: "Paris", text });
    check(typeof found.output_parsed.name === "string", JSON.stringify(found));
    let written = "";
    for await (const event of client.responses.stream({ ...request, input: "What is the capital of France?" })) {
      if (event.type === "response.output_text.delta") written += event.delta;
    }
    check(written.includes("Paris"), written);
  },
};

for (const [name, run] of Object.entries(cases)) {
  let told = "passed";
  try {
    await run();
  } catch (error) {
    told = `${error.name}: ${error.message}`.replaceAll("\n", " ");
  }
  console.log(`${name}: ${told}`);
}
