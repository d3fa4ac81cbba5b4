// The page of `losa serve`: one conversation with the model that this server holds.
//
// From the wire inwards: `readEvents` (bytes to events), `chunksOf` (a request to OpenAI's chunks), `Meter` (usage to
// tokens/s), `Turn` (what is seen of a message), and last the page, which holds the conversation. Whatever comes from
// the server becomes text by `textContent` or a text node, never HTML. Nothing is stored in the browser.

// ---- wire ----

/** What the server refused, or how its answer broke off. */
class ServerError extends Error {
  /**
   * @param {string} message the server's own words
   * @param {{status?: number, code?: string | null, retryAfter?: string | null}} facts status 0: in mid-stream
   */
  constructor(message, { status = 0, code = null, retryAfter = null } = {}) {
    super(String(message).replace(/[.\s]+$/, ""));
    Object.assign(this, { status, code, retryAfter });
  }
}

/**
 * The data of server-sent events, wherever the chunks of the body are cut.
 *
 * @param {ReadableStream<Uint8Array>} body
 * @yields {string}
 */
async function* readEvents(body) {
  // The decoder keeps the first bytes of a character until its last have come.
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value = "", done } = await reader.read();
      // A carriage return behind which more may come can be the first half of a line break.
      const lines = (rest + value).split(done ? /\r\n|\n|\r/ : /\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        if (line === "" && data.length > 0) {
          yield data.join("\n");
          data = [];
        }
      }
      if (done) return;
    }
  } finally {
    // Frees the connection when the reader leaves early; a stream that failed says so a second time here.
    reader.cancel().catch(() => {});
  }
}

/** Headers with the API key, if there is one. */
function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** A refusal as the error that it tells; proxies may answer in another form. */
async function refusal(response) {
  const told = await response.json().catch(() => null);
  return new ServerError(told?.error?.message ?? (response.statusText || "no reason given"), {
    status: response.status,
    code: told?.error?.code ?? null,
    retryAfter: response.headers.get("Retry-After"),
  });
}

/**
 * An answer as it comes.
 *
 * @param {string} path of the endpoint
 * @param {object} request its body, but for what makes it a stream
 * @param {string} key '' if there is none
 * @param {AbortSignal} signal ends it
 * @yields {object} chunks in OpenAI's form
 * @throws {ServerError} when it is refused or breaks off
 */
async function* chunksOf(path, request, key, signal) {
  const streamed = { stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  const response = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers(key) },
    body: JSON.stringify({ ...request, ...streamed }),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  for await (const data of readEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message ?? "no reason given", { code: chunk.error.code });
    yield chunk;
  }
  throw new ServerError("the connection ended before the answer was complete");
}

/** An error in words for the reader. */
function explain(error) {
  if (!(error instanceof ServerError)) {
    // What fetch throws has other words in each browser.
    return error instanceof SyntaxError
      ? "The server sent something that is no answer; is another program at this address?"
      : "The server cannot be reached; is it still running?";
  }
  const wait = /^\d+$/.test(error.retryAfter ?? "") ? ` Try again in ${error.retryAfter} s.` : "";
  switch (error.status) {
    case 0: return `The answer broke off: ${error.message}.`;
    case 401: return `The server asks for an API key; enter it under Settings. It said: ${error.message}.`;
    case 429: return `The server is busy: ${error.message}.${wait}`;
    case 503: return `The server takes no requests now: ${error.message}.${wait}`;
    default: return `The server refused (${error.status}): ${error.message}.${wait}`;
  }
}

// ---- speed ----

/** Counts an answer's tokens by usage: a chunk may hold more or fewer than one. */
class Meter {
  /** @param {number} sent when the request left, in ms */
  constructor(sent) {
    this.sent = sent;
    this.begun = null; // when the first token came, in ms
    this.first = null; // tokens and time at the first usage that counts any
    this.last = null; // and at the newest
  }

  /**
   * @param {string} piece text of a chunk
   * @param {{completion_tokens: number} | null | undefined} usage so far; some servers tell it at the end alone
   * @param {number} now in ms
   */
  take(piece, usage, now) {
    const tokens = usage?.completion_tokens ?? 0;
    // A token may be the first half of a character, and then brings no text yet.
    if (piece || tokens > 0) this.begun ??= now;
    if (tokens <= (this.last?.tokens ?? 0)) return;
    this.last = { tokens, now };
    this.first ??= this.last;
  }

  /** What is known so far. The rate leaves the first chunk out, whose time is the prompt's. */
  toString() {
    if (this.begun === null) return "";
    const parts = [`first token after ${((this.begun - this.sent) / 1000).toFixed(2)} s`];
    if (this.last === null) return parts[0];
    const seconds = (this.last.now - this.first.now) / 1000;
    if (seconds > 0) parts.push(`${((this.last.tokens - this.first.tokens) / seconds).toFixed(1)} tokens/s`);
    parts.push(this.last.tokens === 1 ? "1 token" : `${this.last.tokens} tokens`);
    return parts.join(" · ");
  }
}

// ---- what is seen ----

const element = (id) => document.getElementById(id);

/** A new element with a class and text. */
function make(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

/** One message in the conversation: whose it is, its words, and for an answer its figures and what became of it. */
class Turn {
  /** @param {string} who  @param {string} kind 'question' or 'answer' */
  constructor(who, kind) {
    this.article = make("article", `turn ${kind}`);
    this.figures = make("p", "figures");
    // Figures change with each token; nobody wants to hear that.
    this.figures.setAttribute("aria-live", "off");
    this.text = document.createTextNode("");
    const words = make("p", "words");
    words.append(this.text);
    this.article.append(make("h2", "", who), words, this.figures);
    followed(() => element("conversation").append(this.article));
  }

  get words() {
    return this.text.data;
  }

  add(piece) {
    followed(() => this.text.appendData(piece));
  }

  measure(meter) {
    followed(() => (this.figures.textContent = String(meter)));
  }

  /** @param {string} text  @param {boolean} trouble  @param {HTMLElement[]} more such as a button */
  note(text, trouble, ...more) {
    const note = make("p", trouble ? "note trouble" : "note hint", text);
    if (trouble) note.setAttribute("role", "alert");
    note.append(...more);
    followed(() => this.article.append(note));
  }
}

/** Change the conversation and keep its end in sight, unless the reader has scrolled away from it. */
function followed(change) {
  const view = element("conversation");
  const atEnd = view.scrollHeight - view.scrollTop - view.clientHeight < 40;
  change();
  if (atEnd) view.scrollTop = view.scrollHeight;
}

// ---- the model ----

/** Bytes as people write them. */
function size(bytes) {
  return bytes < 1e9 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(2)} GB`;
}

/** A share of zeros; of a dense model there is none. */
function percent(fraction) {
  return fraction ? `${Number((100 * fraction).toFixed(1))} %` : "dense";
}

/** Show what is served. Its name goes into requests. */
function showModel(served) {
  model = served.id;
  element("model").textContent = model;
  document.title = `${model} · losa serve`;
  const facts = served.losa ?? {};
  const shown = (value, form = String) => (value === null || value === undefined ? "–" : form(value));
  // A server that tells of these at all says null for a model that has none.
  element("kernel").textContent = "kernel_row" in facts ? (facts.kernel_row ?? "none") : "–";
  element("sparsity").textContent = "sparsity_fraction" in facts ? percent(facts.sparsity_fraction) : "–";
  element("values").textContent = shown(facts.values);
  element("weights").textContent = shown(facts.weights_bytes, size);
  element("context").textContent = shown(facts.context_tokens, (count) => `${count.toLocaleString("en")} tokens`);
  element("threads").textContent = shown(facts.threads);
  if (facts.context_tokens) fitAnswer(facts.context_tokens);
}

/** The page's own wish for max tokens must not be more than a small model can hold. The reader's is left alone. */
function fitAnswer(contextTokens) {
  const field = element("max-tokens");
  if (field.value === field.defaultValue) {
    field.value = field.defaultValue = Math.max(1, Math.min(256, Math.floor(contextTokens / 2)));
  }
}

/** Ask what is served, and say so if that cannot be known. */
async function loadModel() {
  const trouble = element("trouble");
  try {
    const response = await fetch("v1/models", { headers: headers(element("key").value) });
    if (!response.ok) throw await refusal(response);
    const { data } = await response.json();
    if (!data?.[0]?.id) throw new SyntaxError("this is no list of models");
    showModel(data[0]);
    trouble.hidden = true;
  } catch (error) {
    trouble.textContent = explain(error);
    trouble.hidden = false;
    if (error.status === 401) element("settings").open = true;
  }
}

// ---- the conversation ----

const NUMBERS = { temperature: "temperature", top_p: "top-p", max_tokens: "max-tokens", seed: "seed" };

let model = null; // the name, once the server has told it
let history = []; // messages that were answered, in OpenAI's form
let running = null; // AbortController of the answer under way

/** The first setting that is no number in its range, if any. */
function wrongSetting() {
  return Object.values(NUMBERS).map(element).find((field) => !field.checkValidity());
}

/** Endpoint and body for a text. An empty setting is left out: the server's own value counts. */
function compose(text) {
  const request = model === null ? {} : { model };
  for (const [name, id] of Object.entries(NUMBERS)) {
    const value = element(id).valueAsNumber;
    if (!Number.isNaN(value)) request[name] = value;
  }
  if (element("plain").checked) return ["v1/completions", { ...request, prompt: text }];
  const system = element("system").value.trim();
  const opening = system ? [{ role: "system", content: system }] : [];
  return ["v1/chat/completions", { ...request, messages: [...opening, ...history, { role: "user", content: text }] }];
}

/** Send a text and show its answer as it comes. */
async function ask(text) {
  const plain = element("plain").checked;
  const [path, request] = compose(text);
  element("empty").hidden = true;
  new Turn("You", "question").add(text);
  const answer = new Turn(model ?? "Model", "answer");
  const controller = new AbortController();
  const meter = new Meter(performance.now());
  begin(controller);
  let outcome = "The answer is complete.";
  try {
    for await (const chunk of chunksOf(path, request, element("key").value, controller.signal)) {
      const choice = chunk.choices?.[0];
      const piece = choice?.delta?.content ?? choice?.text ?? "";
      answer.add(piece);
      meter.take(piece, chunk.usage, performance.now());
      answer.measure(meter);
      if (choice?.finish_reason === "length") answer.note("Ended by its greatest length.", false);
    }
  } catch (error) {
    if (controller.signal.aborted) {
      outcome = "Stopped.";
      answer.note(outcome, false);
    } else {
      outcome = "The answer failed.";
      fail(answer, error, text);
    }
  }
  // What was answered in part can be spoken of. A question without an answer would leave two of the reader's turns in
  // a row, which many chat templates refuse; so would an answer to a conversation that has since been cleared.
  if (answer.words && !plain && running === controller) {
    history.push({ role: "user", content: text }, { role: "assistant", content: answer.words });
  }
  if (running === controller) end(outcome);
}

/** Tell of a failure where the answer would be, and give the reader the text back. */
function fail(answer, error, text) {
  const more = [];
  if (error.code === "no_chat_template") {
    const button = make("button", "", "Use plain completion");
    button.type = "button";
    button.addEventListener("click", () => {
      element("plain").checked = true;
      showMode();
      button.disabled = true;
      send();
    });
    more.push(button);
  }
  answer.note(explain(error), true, ...more);
  const prompt = element("prompt");
  if (!answer.words && !prompt.value) prompt.value = text;
  if (error.status === 401) {
    element("settings").open = true;
    element("key").focus();
  }
}

function begin(controller) {
  running = controller;
  element("conversation").setAttribute("aria-busy", "true");
  element("status").textContent = "Answering…";
  showButtons();
}

function end(outcome) {
  running = null;
  element("conversation").setAttribute("aria-busy", "false");
  element("status").textContent = outcome;
  showButtons();
}

/** Send or Stop, whichever can be done; the focus must not vanish with a button. */
function showButtons() {
  const lost = [element("send"), element("stop")].includes(document.activeElement);
  element("send").hidden = running !== null;
  element("stop").hidden = running === null;
  if (lost) element("prompt").focus();
}

/** A system prompt means nothing to a plain completion. */
function showMode() {
  element("system").disabled = element("plain").checked;
}

function send() {
  const prompt = element("prompt");
  const text = prompt.value;
  if (running !== null || text.trim() === "") return;
  const wrong = wrongSetting();
  if (wrong) {
    element("settings").open = true;
    wrong.reportValidity();
    return;
  }
  prompt.value = "";
  ask(text);
}

function clear() {
  running?.abort();
  history = [];
  if (running !== null) end("Stopped.");
  for (const turn of document.querySelectorAll(".turn")) turn.remove();
  element("empty").hidden = false;
  element("prompt").focus();
}

element("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
element("prompt").addEventListener("keydown", (event) => {
  // Enter within an input method chooses a word.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
element("stop").addEventListener("click", () => running?.abort());
element("clear").addEventListener("click", clear);
element("plain").addEventListener("change", showMode);
element("key").addEventListener("change", loadModel);

element("settings").open = matchMedia("(min-width: 60rem)").matches;
showMode();
loadModel();
