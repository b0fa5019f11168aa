// The dialog that shows an answer's request as code.
import { byId, copyText } from "./dom.js";
import { asCurl, asPython } from "./request.js";

let isListening = false;

/** `kind`: curl or Python. What only this page asks for (the stream, its trace) is left out. */
export function showCode(kind, path, body, needsKey) {
  const { stream, stream_options, return_speculation_stats, ...plain } = body;
  const { trace, ...speculation } = plain.speculation;
  plain.speculation = speculation;
  byId("code-title").textContent = `The same request with ${kind}`;
  byId("code-text").textContent = (kind === "curl" ? asCurl : asPython)(path, plain, needsKey);
  byId("code-state").textContent = "";
  listen();
  byId("code-dialog").showModal();
}

function listen() {
  if (isListening) return;
  isListening = true;
  byId("code-close").addEventListener("click", () => byId("code-dialog").close());
  byId("code-copy").addEventListener("click", async () => {
    const isCopied = await copyText(byId("code-text").textContent);
    byId("code-state").textContent = isCopied ? "Copied" : "This browser copies from https and localhost only; select the text";
  });
}
