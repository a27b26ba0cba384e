// The engine, live: rates from totals, the page maps, a row for each slot in use.

import { PageMap, slotColour, css } from "./pagemap.js";

const $ = (id) => document.getElementById(id);
const STATES = ["reads prompt", "writes", "stopping", "makes room"];
const SPAN = 2; // seconds that a rate is taken over
const KEPT = 60; // seconds in the sparkline
const number = (x) => x.toLocaleString("en");

export class Live {
  constructor() {
    this.maps = [];
    this.rows = new Map(); // slot: its row
    this.past = []; // [time, tokens, steps] of recent views, for rates
    this.rates = []; // [time, tokens/s]
    this.views = 0;
    new ResizeObserver(() => this.spark()).observe($("spark"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.spark());
  }

  take(view) {
    this.rate(view);
    this.numbers(view.stats);
    const told = new Map(view.slots.map((row) => [row[0], tell(row)]));
    this.show(view, told);
    this.list(view);
    $("live").classList.remove("quiet");
    $("live").dataset.views = ++this.views;
  }

  /** Nothing comes any more: what is shown is old. */
  quiet() {
    $("live").classList.add("quiet");
    this.past = [];
  }

  resize() {
    for (const map of this.maps) map.layout();
    this.spark();
  }

  rate({ time, stats, maps }) {
    // A model that only reads has no pages, and what it reads is what it does.
    const done = maps.length ? stats.generation_tokens : stats.prompt_tokens;
    $("rate-unit").textContent = maps.length ? "tokens/s" : "tokens read/s";
    $("live").classList.toggle("bare", !maps.length);
    if (this.past.length && time < this.past.at(-1)[0]) this.past = this.rates = []; // another engine
    this.past.push([time, done, stats.steps]);
    while (this.past.length > 2 && this.past[1][0] <= time - SPAN) this.past.shift();
    const [then, tokens, steps] = this.past[0];
    const seconds = time - then;
    const rate = seconds > 0 ? (done - tokens) / seconds : 0;
    const stepRate = seconds > 0 ? (stats.steps - steps) / seconds : 0;
    this.rates.push([time, rate]);
    while (this.rates[0][0] < time - KEPT) this.rates.shift();
    $("rate").textContent = rate < 100 ? rate.toFixed(rate < 10 && rate > 0 ? 1 : 0) : number(Math.round(rate));
    $("steps").textContent = stepRate < 10 && stepRate > 0 ? stepRate.toFixed(1) : number(Math.round(stepRate));
    this.spark();
  }

  numbers(stats) {
    const pair = (value, of) => {
      const small = document.createElement("small");
      small.textContent = ` of ${number(of)}`;
      return [number(value), small];
    };
    $("running").replaceChildren(...pair(stats.running, stats.slots));
    $("waiting").textContent = number(stats.waiting);
    $("in-flight").textContent = stats.in_flight;
    const share = stats.prefix_queries ? (100 * stats.prefix_hits) / stats.prefix_queries : 0;
    $("hit-rate").textContent = stats.prefix_queries ? `${number(stats.prefix_hits)} (${share.toFixed(0)}%)` : "0";
    $("preemptions").textContent = number(stats.preemptions);
    $("stalls").textContent = number(stats.stalls);
    $("generated").textContent = number(stats.generation_tokens);
    $("compiles").textContent = number(stats.compiles_after_ready);
    $("restarts").textContent = number(stats.restarts);
    $("compiles").classList.toggle("bad", stats.compiles_after_ready > 0);
    $("restarts").classList.toggle("bad", stats.restarts > 0);
    Object.assign($("live").dataset, { running: stats.running, hits: stats.prefix_hits });
  }

  show(view, told) {
    if (this.maps.length !== view.maps.length) {
      const several = view.maps.length > 1;
      this.maps = view.maps.map((_, i) => new PageMap(several ? i : null, $("tip")));
      $("maps").replaceChildren(...this.maps.map((map) => map.root));
    }
    view.maps.forEach((map, i) => this.maps[i].take(map, told));
  }

  list(view) {
    const seen = new Set();
    for (const row of view.slots) {
      seen.add(row[0]);
      if (!this.rows.has(row[0])) this.rows.set(row[0], new Row(row[0], (slot) => this.focus(slot)));
      this.rows.get(row[0]).take(row);
    }
    for (const [slot, row] of this.rows) {
      if (seen.has(slot)) continue;
      row.root.remove();
      this.rows.delete(slot);
      if (this.maps[0]?.only === slot) this.focus(-1);
    }
    const sorted = [...this.rows.keys()].sort((a, b) => a - b);
    sorted.forEach((slot, i) => {
      const root = this.rows.get(slot).root, there = $("slots").children[i];
      if (there !== root) $("slots").insertBefore(root, there ?? null);
    });
    const waiting = view.stats.waiting;
    $("slots-note").textContent = view.slots.length
      ? `${number(view.slots.length)} busy${waiting ? `, ${number(waiting)} waiting for one` : ""}`
      : "all idle";
  }

  focus(slot) {
    for (const map of this.maps) map.focus(slot);
  }

  spark() {
    const canvas = $("spark"), scale = devicePixelRatio || 1;
    const width = Math.round(canvas.clientWidth * scale), height = Math.round(canvas.clientHeight * scale);
    if (!width || !height) return;
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    if (this.rates.length < 2) return;
    const accent = getComputedStyle(canvas).color, end = this.rates.at(-1)[0];
    const most = Math.max(10, ...this.rates.map(([, rate]) => rate)) * 1.08;
    const line = 1.6 * scale;
    const points = this.rates.map(([time, rate]) => [width * (1 - (end - time) / KEPT) - line, height - line - (height - 2 * line) * (rate / most)]);
    context.beginPath();
    points.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
    context.lineWidth = line;
    context.lineJoin = "round";
    context.strokeStyle = accent;
    context.stroke();
    context.lineTo(points.at(-1)[0], height);
    context.lineTo(points[0][0], height);
    context.globalAlpha = 0.13;
    context.fillStyle = accent;
    context.fill();
    context.globalAlpha = 1;
  }
}

function tell([, , state, prompt, length, goal]) {
  return state === 0 ? `reads its prompt, ${number(length)} of ${number(goal)}` : `${STATES[state]}, ${number(prompt)} in, ${number(Math.max(0, length - prompt))} out`;
}

/** One slot's sequence: what it does, and how far it is. */
class Row {
  constructor(slot, focus) {
    this.root = document.createElement("li");
    this.root.style.setProperty("--own", css(slotColour(slot)));
    for (const name of ["name", "state", "bar", "count", "pages"]) {
      this[name] = document.createElement("span");
      this[name].className = name;
      this.root.append(this[name]);
    }
    this.asked = document.createElement("i");
    this.given = document.createElement("i");
    this.bar.append(this.asked, this.given);
    this.name.textContent = slot;
    this.root.addEventListener("pointerenter", () => focus(slot));
    this.root.addEventListener("pointerleave", () => focus(-1));
  }

  take([, , state, prompt, length, goal, pages]) {
    this.root.dataset.state = state;
    this.state.textContent = STATES[state];
    const read = state === 0 ? length : Math.min(prompt, length);
    this.asked.style.width = `${(100 * read) / goal}%`;
    this.given.style.width = state === 0 ? "0" : `${(100 * (length - read)) / goal}%`;
    this.count.textContent = `${number(length)} / ${number(goal)}`;
    this.pages.textContent = `${number(pages)} p`;
    this.root.title = "tokens so far, tokens at its limit, pages";
  }
}
