// Talks to the server that brought this page: JSON, server-sent events over fetch (which, unlike EventSource, sends a
// key), and its errors with its own words. The key lives in sessionStorage, as long as the tab.

const KEY = "specserve-key";

let key = "";
try {
  key = sessionStorage.getItem(KEY) ?? "";
} catch {
  // storage may be forbidden; then the key is kept until the page is loaded again
}

export const hasKey = () => key !== "";

export function setKey(value) {
  key = value.trim();
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch {
    // as above
  }
}

/** What the server says is wrong; status 0: it was not reached. */
export class ApiError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }

  /** "404 model_not_found", for beside the message. */
  get label() {
    return [this.status || null, this.code].filter(Boolean).join(" ");
  }
}

async function request(path, { body, signal } = {}) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body === undefined ? "GET" : "POST", headers, body, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it running?");
  }
  if (response.ok) return response;
  if (response.status === 401) document.dispatchEvent(new CustomEvent("key-needed"));
  throw await errorOf(response);
}

async function errorOf(response) {
  const text = await response.text().catch(() => "");
  try {
    const { error } = JSON.parse(text);
    return new ApiError(error.message ?? String(error), response.status, error.code ?? error.type);
  } catch {
    return new ApiError(text.slice(0, 500) || response.statusText || "no reason was given", response.status);
  }
}

export async function getJson(path, signal) {
  return (await request(path, { signal })).json();
}

export async function getBlob(path) {
  return (await request(path)).blob();
}

/** Batches of events, as they arrive, until the stream's end; raises `ApiError` for one that is an error or is cut off. */
export async function* stream(path, { body, signal, isEndless = false } = {}) {
  const response = await request(path, { body: body && JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let read;
      try {
        read = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError("The connection broke off before the answer was complete.");
      }
      if (read.done) {
        if (isEndless) return;
        throw new ApiError("The server ended the connection before the answer was complete.");
      }
      const parts = (rest + read.value).split("\n\n");
      rest = parts.pop();
      const batch = [];
      let isLast = false;
      for (const part of parts) {
        const data = dataOf(part);
        if (data === "[DONE]") isLast = true;
        else if (data) batch.push(JSON.parse(data));
      }
      const failed = batch.findIndex((event) => event.error);
      if (failed > 0) yield batch.slice(0, failed);
      if (failed >= 0) throw new ApiError(batch[failed].error.message, 0, batch[failed].error.code);
      if (batch.length) yield batch;
      if (isLast) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function dataOf(part) {
  const lines = part.split("\n").filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).trimStart()).join("\n");
}
