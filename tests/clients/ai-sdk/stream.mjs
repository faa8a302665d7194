// Stream one answer with the AI SDK: `node stream.mjs PROVIDER BASE_URL`. Prints {text, error}.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { streamText } from "ai";

const [provider, base] = process.argv.slice(2);
const options = { name: "kubeai", baseURL: `${base}/v1`, apiKey: "none" };
const models = {
  compatible: () => createOpenAICompatible(options).chatModel("m"),
  "compatible-completion": () => createOpenAICompatible(options).completionModel("m"),
  openai: () => createOpenAI(options).chat("m"),
  "openai-responses": () => createOpenAI(options).responses("m"),
  anthropic: () => createAnthropic(options)("m"),
};

globalThis.AI_SDK_LOG_WARNINGS = false; // they would be printed beside the result
let text = "";
let error = null;
const result = streamText({
  model: models[provider](),
  prompt: "Hello",
  maxRetries: 0,
  onError: () => {},
});
for await (const part of result.fullStream) {
  if (part.type === "text-delta") text += part.text ?? part.textDelta ?? part.delta ?? "";
  if (part.type === "error") error = String(part.error?.message ?? JSON.stringify(part.error));
}
console.log(JSON.stringify({ text, error }));
