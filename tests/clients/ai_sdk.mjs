// What the AI SDK asks of the server; `test_frameworks.py` runs this in a folder that has its packages.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({
  name: "ullm",
  baseURL: process.argv[2],
  apiKey: "x",
  supportsStructuredOutputs: true,
  includeUsage: true,
});
const model = provider("SmolLM2-135M-Instruct");
const city = z.object({ name: z.string().max(20), inhabitants: z.number().int() });
const settings = { model, temperature: 0, maxOutputTokens: 300, maxRetries: 0 };
const called = [];
const tools = {
  add: tool({
    description: "Add two numbers.",
    inputSchema: z.object({ a: z.number().int(), b: z.number().int() }),
    execute: async ({ a, b }) => {
      called.push([a, b]);
      return a + b;
    },
  }),
};

function check(condition, what) {
  if (!condition) throw new Error(what);
}

const cases = {
  async text() {
    const { text, usage } = await generateText({ ...settings, prompt: "What is the capital of France?" });
    check(text.includes("Paris"), text);
    check(usage.outputTokens > 0, JSON.stringify(usage));
  },
  async stream() {
    const result = streamText({ ...settings, prompt: "What is the capital of France?" });
    let text = "";
    for await (const piece of result.textStream) text += piece;
    check(text.includes("Paris"), text);
    check((await result.usage).outputTokens > 0, "no usage");
  },
  async object() {
    const { output } = await generateText({ ...settings, prompt: "Paris", output: Output.object({ schema: city }) });
    check(typeof output.name === "string", JSON.stringify(output));
  },
  async objectStream() {
    const result = streamText({ ...settings, prompt: "Paris", output: Output.object({ schema: city }) });
    for await (const _ of result.partialOutputStream);
    check(typeof (await result.output).name === "string", "no object");
  },
  async choice() {
    const { output } = await generateText({
      ...settings,
      prompt: "Is Paris a city?",
      output: Output.choice({ options: ["yes", "no"] }),
    });
    check(["yes", "no"].includes(output), output);
  },
  async toolCall() {
    const { toolCalls } = await generateText({
      ...settings,
      tools,
      toolChoice: { type: "tool", toolName: "add" },
      prompt: "Add 2 and 3",
    });
    check(toolCalls[0].toolName === "add", JSON.stringify(toolCalls));
    check(called.length > 0, "not executed");
  },
  async toolLoop() {
    const before = called.length;
    const result = streamText({
      ...settings,
      tools,
      toolChoice: "required",
      stopWhen: stepCountIs(2),
      prompt: "Add 2 and 3",
    });
    await result.consumeStream();
    check((await result.steps).length === 2, "no second step");
    check(called.length > before, "not executed");
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
