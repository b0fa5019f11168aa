// A request as the API takes it, from what the settings say; and the same request as curl and Python.

/** A setting that cannot be sent; its message is for the user. */
export class SettingError extends Error {}

/** The part of a body that settings give: all but model, prompt and messages. */
export function fieldsOf(settings, isChat) {
  const fields = { max_tokens: count(settings.max_tokens, "Max tokens") ?? undefined, temperature: decimal(settings.temperature, "Temperature") };
  fields.top_p = decimal(settings.top_p, "Top p");
  fields.top_k = count(settings.top_k, "Top k");
  fields.seed = count(settings.seed, "Seed");
  if (settings.stop) fields.stop = settings.stop;
  if (settings.prediction) fields.prediction = { type: "content", content: settings.prediction };
  if (settings.schema.trim()) {
    const schema = json(settings.schema, "JSON schema");
    fields.response_format = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
  }
  if (isChat && settings.tools.trim()) {
    fields.tools = json(settings.tools, "Tools");
    fields.tool_choice = settings.tool_choice;
  }
  fields.speculation = { mode: settings.mode };
  const longest = count(settings.max_draft_tokens, "Longest draft");
  if (longest !== undefined && settings.mode !== "off") fields.speculation.max_draft_tokens = longest;
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined));
}

/** `body` with what this page wants to see of it. */
export function traced(body) {
  return {
    ...body,
    stream: true,
    stream_options: { include_usage: true },
    return_speculation_stats: true,
    speculation: { ...body.speculation, trace: true },
  };
}

/** `body` without drafts. */
export const undrafted = (body) => ({ ...body, speculation: { mode: "off" } });

export const newSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

function decimal(text, name) {
  if (text.trim() === "") return undefined;
  const value = Number(text);
  if (!Number.isFinite(value)) throw new SettingError(`${name} is ${JSON.stringify(text)}; write a number.`);
  return value;
}

function count(text, name) {
  const value = decimal(text, name);
  if (value !== undefined && !Number.isSafeInteger(value)) throw new SettingError(`${name} is ${text}; write a whole number.`);
  return value;
}

function json(text, name) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new SettingError(`${name} is not valid JSON: ${error.message}`);
  }
}

// -- code

/** A shell command; `body` is JSON between single quotes. */
export function asCurl(path, body, needsKey) {
  const lines = [`curl ${location.origin}${path}`, "-H 'Content-Type: application/json'"];
  if (needsKey) lines.push('-H "Authorization: Bearer $SPECSERVE_API_KEY"');
  lines.push(`-d '${JSON.stringify(body, null, 2).replaceAll("'", "'\\''")}'`);
  return lines.join(" \\\n  ");
}

const OPENAI = new Set(["model", "messages", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop", "tools", "tool_choice", "response_format"]);

/** For the openai package; what it does not know goes through `extra_body`. */
export function asPython(path, body, needsKey) {
  const isChat = path.endsWith("/chat/completions");
  const known = Object.entries(body).filter(([name]) => OPENAI.has(name) && (isChat || name !== "response_format"));
  const others = Object.fromEntries(Object.entries(body).filter(([name]) => !known.some(([other]) => other === name)));
  const args = known.map(([name, value]) => `    ${name}=${python(value, 1)},`);
  if (Object.keys(others).length) args.push(`    extra_body=${python(others, 1)},`);
  const key = needsKey ? 'os.environ["SPECSERVE_API_KEY"]' : '"none"';
  return [
    ...(needsKey ? ["import os", ""] : []),
    "import openai",
    "",
    `client = openai.OpenAI(base_url="${location.origin}/v1", api_key=${key})`,
    `answer = client.${isChat ? "chat.completions" : "completions"}.create(`,
    ...args,
    ")",
    `print(answer.choices[0].${isChat ? "message" : "text"}${isChat && !body.tools ? ".content" : ""})`,
  ].join("\n");
}

function python(value, depth) {
  const indent = "    ".repeat(depth + 1);
  const end = "    ".repeat(depth);
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const isList = Array.isArray(value);
  const items = isList ? value.map((item) => python(item, depth + 1)) : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${python(item, depth + 1)}`);
  const [open, close] = isList ? "[]" : "{}";
  const short = `${open}${items.join(", ")}${close}`;
  if (short.length <= 88 && !short.includes("\n")) return short;
  return `${open}\n${items.map((item) => `${indent}${item},`).join("\n")}\n${end}${close}`;
}
