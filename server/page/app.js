// The page: which part is shown, the key, and what the engine's state means for both parts.

import { Chat } from "./chat.js";
import { Live } from "./live.js";
import { key, request, events, Unauthorized } from "./net.js";

const $ = (id) => document.getElementById(id);
const SILENCE = 6000; // milliseconds without a byte: the server sends some every second
const PAUSES = [1000, 2000, 4000, 8000]; // milliseconds before trying again

const live = new Live();
const chat = new Chat(askForKey);
let pause = null; // how to end the wait for the next try

function show(state, label, trouble = "") {
  $("status").dataset.state = state;
  $("status").querySelector("b").textContent = label;
  $("banner").hidden = !trouble;
  $("banner").textContent = trouble;
  document.body.dataset.state = state;
}

function take(state) {
  $("model").textContent = state.model;
  $("welcome-model").textContent = state.model.split("/").pop();
  document.title = `${state.model.split("/").pop()} · Octavo`;
  document.body.dataset.mode = state.mode;
  chat.use(state);
  if (state.state === "ready") show("ready", "ready");
  else if (state.state === "starting") show("starting", "starting", "The engine is starting: it loads the model and compiles its programs.");
  else if (state.state === "stopped") show("stopped", "stopped", sentence(state.message));
  else show("trouble", "silent", sentence(state.message));
  if (state.state !== "ready") live.quiet();
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

/** Read /live until it ends or falls silent. */
async function watch() {
  const control = new AbortController();
  let timer = setTimeout(() => control.abort(), SILENCE);
  const heard = () => {
    clearTimeout(timer);
    timer = setTimeout(() => control.abort(), SILENCE);
  };
  try {
    const response = await request("live", { signal: control.signal });
    for await (const event of events(response, heard)) {
      if (event.kind === "state") take(event);
      else if (event.kind === "view") live.take(event);
    }
  } finally {
    clearTimeout(timer);
    live.quiet();
  }
}

async function watchForever() {
  for (let tries = 0; ; ) {
    const began = Date.now();
    try {
      await watch();
      show("lost", "no connection", "The server closed the connection. Trying again…");
    } catch (error) {
      if (error instanceof Unauthorized) {
        show("locked", "key needed", "This server asks for an API key.");
        askForKey();
      } else {
        const told = error instanceof TypeError || error.name === "AbortError";
        show("lost", "no connection", told ? "The server cannot be reached. Trying again…" : sentence(error.message));
      }
    }
    tries = Date.now() - began > 10000 ? 0 : tries;
    await new Promise((resolve) => {
      pause = resolve;
      setTimeout(resolve, PAUSES[Math.min(tries++, PAUSES.length - 1)]);
    });
    while ($("key-dialog").open) await new Promise((resolve) => $("key-dialog").addEventListener("close", resolve, { once: true }));
  }
}

function askForKey() {
  if ($("key-dialog").open) return;
  $("key").value = key.get();
  $("key-dialog").showModal();
}

function connectKey() {
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key.set($("key").value.trim());
    $("key-dialog").close();
    pause?.();
  });
  $("key-cancel").addEventListener("click", () => $("key-dialog").close());
  $("key-button").addEventListener("click", askForKey);
}

function connectTabs() {
  for (const name of ["chat", "live"]) {
    $(`tab-${name}`).addEventListener("click", () => {
      document.body.dataset.tab = name;
      for (const other of ["chat", "live"]) $(`tab-${other}`).setAttribute("aria-pressed", String(other === name));
      live.resize();
    });
  }
}

connectKey();
connectTabs();
watchForever();
