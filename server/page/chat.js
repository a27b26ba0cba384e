// The chat: one conversation, streamed. Whatever a model writes goes in as text, never as markup.

import { request, events, Unauthorized } from "./net.js";

const $ = (id) => document.getElementById(id);
const SETTINGS = ["system", "temperature", "max-tokens"];

export class Chat {
  constructor(askForKey) {
    this.askForKey = askForKey;
    this.history = []; // what the model is told: {role, content}
    this.model = "";
    this.mode = "chat";
    this.running = null; // AbortController of the answer under way
    this.connect();
  }

  /** What the server says of its model. */
  use({ model, mode }) {
    this.model = model;
    this.mode = mode;
    if (mode === "text") {
      $("welcome-text").textContent =
        "This model has no chat template: it goes on from the text that you give it, each time anew.";
      $("input").placeholder = "Text to go on from";
    }
  }

  connect() {
    const input = $("input");
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send(input.value);
    });
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send(input.value);
      } else if (event.key === "Escape") {
        this.running?.abort();
      }
    });
    input.addEventListener("input", () => this.fit());
    $("stop").addEventListener("click", () => this.running?.abort());
    $("new-chat").addEventListener("click", () => this.clear());
    for (const button of $("ideas").querySelectorAll("button")) {
      button.addEventListener("click", () => this.send(button.textContent));
    }
    $("settings-button").addEventListener("click", () => {
      $("settings").hidden = !$("settings").hidden;
      $("settings-button").setAttribute("aria-expanded", String(!$("settings").hidden));
    });
    for (const id of SETTINGS) {
      $(id).value = sessionStorage.getItem(`octavo-${id}`) ?? "";
      $(id).addEventListener("change", () => sessionStorage.setItem(`octavo-${id}`, $(id).value));
    }
  }

  fit() {
    const input = $("input");
    input.style.height = "auto";
    input.style.height = `${Math.min(input.scrollHeight, 200)}px`;
  }

  clear() {
    this.running?.abort();
    this.history = [];
    $("messages").replaceChildren();
    $("welcome").hidden = false;
    $("input").focus();
  }

  async send(text) {
    text = text.trim();
    if (!text || this.running) return;
    $("welcome").hidden = true;
    $("input").value = "";
    this.fit();
    const asked = element("article", "message user", text);
    $("messages").append(asked);
    const answer = new Answer();
    $("messages").append(answer.root);
    answer.root.scrollIntoView({ block: "end" });
    const history = this.history;
    history.push({ role: "user", content: text });
    this.busy(new AbortController());
    try {
      await this.stream(answer);
      answer.end();
    } catch (error) {
      if (error.name === "AbortError") answer.end("stopped");
      else if (error instanceof Unauthorized) this.askForKey(), answer.fail("The server asks for an API key.");
      else answer.fail(error instanceof TypeError ? "The server cannot be reached." : error.message);
    }
    this.busy(null);
    if (answer.text) {
      history.push({ role: "assistant", content: answer.text });
    } else {
      history.pop(); // nothing was answered: the model is not told of it
      answer.offer(() => {
        asked.remove();
        answer.root.remove();
        this.send(text);
      });
    }
  }

  busy(control) {
    this.running = control;
    $("send").hidden = Boolean(control);
    $("stop").hidden = !control;
    $("log").setAttribute("aria-busy", String(Boolean(control)));
  }

  body() {
    const body = {
      model: this.model || undefined,
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    };
    if ($("temperature").value) body.temperature = Number($("temperature").value);
    if ($("max-tokens").value) body.max_tokens = Number($("max-tokens").value);
    const system = $("system").value.trim();
    if (this.mode === "text") {
      body.prompt = (system ? `${system}\n\n` : "") + this.history.at(-1).content;
      body.max_tokens ??= 256;
    } else {
      body.messages = [...(system ? [{ role: "system", content: system }] : []), ...this.history];
    }
    return body;
  }

  async stream(answer) {
    const path = this.mode === "text" ? "v1/completions" : "v1/chat/completions";
    const { signal } = this.running;
    const response = await request(path, { method: "POST", body: JSON.stringify(this.body()), signal });
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) answer.usage = chunk.usage;
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      const delta = choice.delta ?? {};
      answer.think(delta.reasoning ?? delta.reasoning_content ?? "");
      answer.write(choice.text ?? delta.content ?? "");
      if (choice.finish_reason) answer.reason = choice.finish_reason;
    }
  }
}

/** One answer: its reasoning (folded), its text, and what it took. */
class Answer {
  constructor() {
    this.text = "";
    this.usage = null;
    this.reason = "";
    this.began = performance.now();
    this.first = this.last = 0;
    this.root = element("article", "message answer waiting");
    this.body = element("div", "text");
    this.foot = element("footer", "facts");
    this.root.append(this.body, this.foot);
    this.root.setAttribute("aria-label", "Answer");
  }

  think(text) {
    if (!text) return;
    this.tick();
    if (!this.thoughts) {
      const fold = element("details", "thoughts");
      fold.append(element("summary", "", "Reasoning"), (this.thoughts = element("div", "")));
      this.root.prepend(fold);
    }
    this.thoughts.append(text);
    this.follow();
  }

  write(text) {
    if (!text) return;
    this.tick();
    this.text += text;
    this.body.append(text);
    this.follow();
  }

  tick() {
    this.last = performance.now();
    this.first ||= this.last;
    this.root.classList.remove("waiting");
    this.root.classList.add("writing");
    this.tell();
  }

  follow() {
    const log = $("log");
    if (log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
  }

  tell(note = "") {
    const parts = [];
    const tokens = this.usage?.completion_tokens ?? 0;
    if (tokens) parts.push(`${tokens} token${tokens === 1 ? "" : "s"}`);
    const seconds = (this.last - this.first) / 1000;
    if (tokens > 1 && seconds > 0.02) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
    if (this.first) parts.push(`first after ${time(this.first - this.began)}`);
    const cached = this.usage?.prompt_tokens_details?.cached_tokens ?? 0;
    if (cached) parts.push(`${cached} of ${this.usage.prompt_tokens} prompt tokens from cache`);
    if (note) parts.push(note);
    this.foot.replaceChildren(...parts.map((part) => element("span", "", part)));
  }

  end(note = "") {
    this.root.classList.remove("waiting", "writing");
    this.body.normalize();
    this.tell(note || (this.reason === "length" ? "cut at the most tokens" : ""));
    this.follow();
  }

  fail(message) {
    this.end();
    this.root.classList.add("failed");
    this.root.append(element("p", "failure", message));
    this.follow();
  }

  offer(again) {
    const button = element("button", "quiet", "Try again");
    button.type = "button";
    button.addEventListener("click", again);
    this.root.append(button);
  }
}

function time(milliseconds) {
  return milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(2)} s`;
}

function element(name, className, text = "") {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}
