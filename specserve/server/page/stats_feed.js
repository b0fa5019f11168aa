// Follows /v1/stats: one snapshot a second, again and again after the engine or the server was away, and what became of
// the counters between two of them. Counters begin anew with an engine: no rate goes over its end.
import { stream } from "./api.js";

const MAX_SAMPLES = 180; // three minutes
const MIN_INTERVAL_S = 0.5;
const PAUSES_S = [0.5, 1, 2, 5];

export class StatsFeed {
  /** `onSample(samples)` after each snapshot, the newest last; `onState(text)`, empty while they come. */
  constructor({ onSample, onState }) {
    this._onSample = onSample;
    this._onState = onState;
    this._abort = null;
    this.samples = [];
  }

  open() {
    if (this._abort !== null) return;
    this._abort = new AbortController();
    this._follow(this._abort.signal);
  }

  close() {
    this._abort?.abort();
    this._abort = null;
  }

  async _follow(signal) {
    let failures = 0;
    while (!signal.aborted) {
      try {
        for await (const batch of stream("/v1/stats?stream=true", { signal, isEndless: true })) {
          for (const snapshot of batch) this._add(snapshot);
          failures = 0;
          this._onState("");
          this._onSample(this.samples);
        }
      } catch (error) {
        if (error.name === "AbortError") return;
        if (error.status === 401 || error.status === 403) {
          // Another try would ask for a key again; `open` makes it, when one was given.
          if (!signal.aborted) this._abort = null;
          this._onState(error.message);
          return;
        }
        this._onState(`${error.message} Trying again.`);
      }
      const pause = PAUSES_S[Math.min(failures, PAUSES_S.length - 1)];
      failures += 1;
      await new Promise((resolve) => setTimeout(resolve, 1000 * pause));
    }
  }

  _add(snapshot) {
    // While a step takes long the engine has told nothing new, or so little later that no rate can be made of it.
    if (snapshot.time_s - this.samples.at(-1)?.snapshot.time_s < MIN_INTERVAL_S) this.samples.pop();
    const last = this.samples.at(-1);
    this.samples.push({ snapshot, rates: last ? ratesOf(last.snapshot, snapshot) : null });
    if (this.samples.length > MAX_SAMPLES) this.samples.shift();
  }
}

/** Tokens a second between two snapshots, and what the cost table says for none drafted; null over an engine's end. */
function ratesOf(before, now) {
  const seconds = now.time_s - before.time_s;
  const generated = now.tokens.generated - before.tokens.generated;
  const isSameEngine = now.engine.num_restarts === before.engine.num_restarts && now.engine.uptime_s >= before.engine.uptime_s;
  if (seconds <= 0 || !isSameEngine || generated < 0) return null;
  return { generated: generated / seconds, undrafted: (now.steps.no_draft_tokens - before.steps.no_draft_tokens) / seconds };
}

/** What the last samples gave in all: {generated, undrafted} a second over those in which there was work. */
export function lately(samples, num = 10) {
  const rates = samples.slice(-num).map((sample) => sample.rates).filter((rate) => rate?.generated > 0);
  const sum = (name) => rates.reduce((total, rate) => total + rate[name], 0) / (rates.length || 1);
  return rates.length ? { generated: sum("generated"), undrafted: sum("undrafted") } : null;
}
