// A request as a program: curl, Python with the `openai` package, JavaScript with `openai`.
//
// A request is `{path, body}` with a JSON body, or `{path, form}` with the fields of a form, in
// which `file` is a file's name. JSON strings are valid in Python and JavaScript as they are.

import { isKeyRequired, publicUrl } from "./api.js";

// Linux limits one argument of a program to 128 KiB.
const ARGUMENT_MAX_BYTES = 100_000;
const NO_KEY = '"none"'; // clients insist on a key
const KEY_VARIABLE = "KUBEAI_API_KEY";

const CALLS = {
  "/chat/completions": { python: "chat.completions", javascript: "chat.completions" },
  "/embeddings": { python: "embeddings", javascript: "embeddings" },
  "/audio/transcriptions": { python: "audio.transcriptions", javascript: "audio.transcriptions" },
};

/** The languages by title, each a function from a request to a program. */
export const LANGUAGES = { curl, Python: python, JavaScript: javascript };

/** Quote a word for a POSIX shell: in single quotes, nothing but the quote itself is special. */
export function shellQuote(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

export function curl({ path, body, form }) {
  const url = shellQuote(publicUrl(path));
  const key = isKeyRequired() ? [`-H "Authorization: Bearer $${KEY_VARIABLE}"`] : [];
  if (form) {
    const { file, ...fields } = form;
    // In `file=@"…"`, curl unescapes backslashes and double quotes.
    const name = file.replaceAll("\\", "\\\\").replaceAll('"', '\\"');
    const parts = Object.entries(fields).map(([key, value]) =>
      `--form-string ${shellQuote(`${key}=${value}`)}`);
    return [`curl ${url}`, ...key, ...parts, `-F ${shellQuote(`file=@"${name}"`)}`].join(" \\\n  ");
  }
  const json = JSON.stringify(body, null, 2);
  const start = [`curl ${body.stream ? "-N " : ""}${url}`, ...key,
    "-H 'Content-Type: application/json' \\\n"].join(" \\\n  ");
  if (new TextEncoder().encode(json).length < ARGUMENT_MAX_BYTES) {
    return `${start}  -d ${shellQuote(json)}`;
  }
  return `${start}  --data-binary @- <<'EOF'\n${json}\nEOF`;
}

/** Whether the packages have no method for a path, but can send to it. */
function isPosted(path) {
  return !(path in CALLS);
}

export function python({ path, body, form }) {
  const key = isKeyRequired() ? `os.environ["${KEY_VARIABLE}"]` : NO_KEY;
  const start = `${isKeyRequired() ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(publicUrl())}, api_key=${key})
`;
  if (isPosted(path)) {
    return `${start}answer = client.post(
    ${JSON.stringify(path)}, cast_to=object, body=${pythonLiteral(body, "    ")}
)
for item in answer["results"]:
    print(item["index"], item["relevance_score"])
`;
  }
  const call = `client.${CALLS[path].python}.create`;
  if (form) {
    const { file, ...fields } = form;
    return `${start}with open(${JSON.stringify(file)}, "rb") as file:
    answer = ${call}(${pythonArguments(fields, "        ")}        file=file,
    )
print(answer.text)
`;
  }
  const create = `${call}(${pythonArguments(body, "    ")})`;
  if (!body.stream) return `${start}answer = ${create}
for item in answer.data:
    print(len(item.embedding), item.embedding[:8])
`;
  return `${start}stream = ${create}
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
`;
}

function pythonArguments(fields, indent) {
  const lines = Object.entries(fields).map(([name, value]) =>
    `${indent}${name}=${pythonLiteral(value, indent)},\n`);
  return `\n${lines.join("")}`;
}

function pythonLiteral(value, indent) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const inner = `${indent}    `;
  const items = Array.isArray(value)
    ? value.map((item) => pythonLiteral(item, inner))
    : Object.entries(value).map(([key, item]) =>
      `${JSON.stringify(key)}: ${pythonLiteral(item, inner)}`);
  const [open, close] = Array.isArray(value) ? ["[", "]"] : ["{", "}"];
  if (items.length === 0) return open + close;
  return `${open}\n${items.map((item) => `${inner}${item},\n`).join("")}${indent}${close}`;
}

export function javascript({ path, body, form }) {
  const key = isKeyRequired() ? `process.env.${KEY_VARIABLE}` : NO_KEY;
  const options = `{ baseURL: ${JSON.stringify(publicUrl())}, apiKey: ${key} }`;
  const start = `import OpenAI from "openai";

const client = new OpenAI(${options});
`;
  if (isPosted(path)) {
    return `${start}const answer = await client.post(${JSON.stringify(path)}, {
  body: ${JSON.stringify(body, null, 2).replaceAll("\n", "\n  ")},
});
for (const item of answer.results) console.log(item.index, item.relevance_score);
`;
  }
  const call = `await client.${CALLS[path].javascript}.create`;
  if (form) {
    const { file, ...fields } = form;
    const lines = Object.entries(fields).map(([key, value]) =>
      `  ${key}: ${JSON.stringify(value)},\n`).join("");
    return `import fs from "node:fs";
${start}const answer = ${call}({
${lines}  file: fs.createReadStream(${JSON.stringify(file)}),
});
console.log(answer.text);
`;
  }
  const create = `${call}(${JSON.stringify(body, null, 2)})`;
  if (!body.stream) return `${start}const answer = ${create};
for (const item of answer.data) console.log(item.embedding.length, item.embedding.slice(0, 8));
`;
  return `${start}const stream = ${create};
for await (const chunk of stream) {
  process.stdout.write(chunk.choices[0]?.delta?.content ?? "");
}
`;
}
