// What the target says: its history once, then a snapshot a second for as long as it answers. Read with fetch, because an
// EventSource can not carry a token. A hidden page holds no stream: a browser has six connections to a target, for all of
// its tabs.

const TOKEN = "cryptfold-token";
// A stream that is silent for so long is given up.
const SILENCE_MS = 10_000;
const MOST_WAIT_MS = 10_000;
// A page that gets no stream (all places are taken) asks so often instead.
const ASK_MS = 2_000;
const ASK_ROUNDS = 15;
// Between a stream's end and the next one.
const PAUSE_MS = 500;
const MOST_BUFFER = 64 << 20;

export class Refused extends Error {
  constructor(status, text) {
    super(text.trim().split("\n")[0].slice(0, 200) || `the target answered with status ${status}`);
    this.status = status;
  }
}

const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

// What a target takes as a token, and a header can carry.
export const isToken = (text) => /^[\x20-\x7e]+$/.test(text);

function untilSeen() {
  return new Promise((done) => {
    const look = () => {
      if (document.hidden) return;
      document.removeEventListener("visibilitychange", look);
      done();
    };
    document.addEventListener("visibilitychange", look);
    look();
  });
}

export class Feed {
  // on: {history(h), snapshot(s), lost(why), token(wasWrong) => promise of a token}
  constructor(on) {
    this.on = on;
    this.wantHistory = true;
    // Given, but not yet known to be right.
    this.tried = null;
    // Ends the stream that is read.
    this.abort = null;
    // The page was hidden since the last try.
    this.hid = false;
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) return;
      this.hid = true;
      this.abort?.abort();
    });
  }

  async get(path, signal) {
    const headers = {};
    const { tried } = this;
    const token = tried ?? this.token();
    if (token !== null) headers.Authorization = `Bearer ${token}`;
    const answer = await fetch(path, { headers, cache: "no-store", signal });
    if (!answer.ok) throw new Refused(answer.status, await answer.text());
    if (tried !== null) this.keep(tried);
    return answer;
  }

  token() {
    try {
      return sessionStorage.getItem(TOKEN) ?? this.kept ?? null;
    } catch {
      return this.kept ?? null;
    }
  }

  keep(token) {
    this.tried = null;
    this.kept = token;
    try {
      if (token === null) sessionStorage.removeItem(TOKEN);
      else sessionStorage.setItem(TOKEN, token);
    } catch {
      // Kept for as long as the page is open.
    }
  }

  // Never ends.
  async run() {
    let failures = 0;
    for (;;) {
      await untilSeen();
      // What has come meanwhile is in the history only.
      this.wantHistory ||= this.hid;
      this.hid = false;
      try {
        await this.once(() => {
          failures = 0;
        });
        await sleep(PAUSE_MS);
      } catch (error) {
        this.wantHistory = true;
        if (this.hid) continue;
        if (error instanceof Refused && error.status === 401) {
          const wrong = (this.tried ?? this.token()) !== null;
          this.keep(null);
          this.tried = await this.on.token(wrong);
          continue;
        }
        this.on.lost(error instanceof Refused ? error.message : "no answer");
        failures += 1;
        await sleep(Math.min(MOST_WAIT_MS, 500 * 2 ** Math.min(failures, 6)) * (0.75 + Math.random() / 2));
      }
    }
  }

  async once(works) {
    if (this.wantHistory) await this.askHistory();
    if (this.hid) return undefined;
    const abort = new AbortController();
    this.abort = abort;
    try {
      return await this.listen(abort, works);
    } catch (error) {
      if (error instanceof Refused && error.status === 503) return this.ask(works);
      throw error;
    } finally {
      // Whatever ended it, its connection is free again.
      abort.abort();
      this.abort = null;
    }
  }

  async listen(abort, works) {
    const answer = await this.timed(abort, (signal) => this.get("/api/v1/stream", signal));
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { value, done } = await this.timed(abort, () => reader.read());
      // Streams have a life; the next one goes on where this one ends.
      if (done) return;
      text += value.replaceAll("\r", "");
      if (text.length > MOST_BUFFER) throw new Error("an event without end");
      const events = text.split("\n\n");
      text = events.pop();
      for (const event of events) {
        const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5));
        if (data.length === 0) continue;
        this.on.snapshot(JSON.parse(data.join("\n")));
        works();
      }
    }
  }

  async askHistory() {
    const abort = new AbortController();
    const history = await this.timed(abort, async (signal) => (await this.get("/api/v1/history", signal)).json());
    this.on.history(history);
    this.wantHistory = false;
  }

  async ask(works) {
    for (let n = 0; n < ASK_ROUNDS && !this.hid; n += 1) {
      const abort = new AbortController();
      const snapshot = await this.timed(abort, async (signal) => (await this.get("/api/v1/snapshot", signal)).json());
      this.on.snapshot(snapshot);
      works();
      await sleep(ASK_MS);
    }
  }

  async timed(abort, work) {
    const timer = setTimeout(() => abort.abort(), SILENCE_MS);
    try {
      return await work(abort.signal);
    } finally {
      clearTimeout(timer);
    }
  }
}
