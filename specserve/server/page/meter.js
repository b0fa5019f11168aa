// What is measured of one answer, from when its events arrived: the same live and when it is replayed.

export class Meter {
  constructor() {
    this.tokens = 0;
    this.forwards = 0;
    this.counts = {}; // tokens by source
    this.firstAt = null; // milliseconds since the request was sent
    this.lastAt = 0;
    this._atFirst = 0; // tokens of the first event
    this._forward = null;
  }

  /** Entries of a trace that arrived `at` milliseconds after the request was sent. */
  add(tokens, at) {
    if (tokens.length === 0) return;
    if (this.firstAt === null) {
      this.firstAt = at;
      this._atFirst = tokens.length;
    }
    this.lastAt = at;
    this.tokens += tokens.length;
    for (const token of tokens) {
      this.counts[token.source] = (this.counts[token.source] ?? 0) + 1;
      if (token.forward !== this._forward) this.forwards += 1;
      this._forward = token.forward;
    }
  }

  /** Tokens a second after the first event; NaN before there are any. */
  get tokensPerS() {
    return (1000 * (this.tokens - this._atFirst)) / (this.lastAt - (this.firstAt ?? 0));
  }

  get tokensPerForward() {
    return this.tokens / this.forwards;
  }
}
