// A page group on a canvas: one cell a page, its colour the slot that owns it.

export const FREE = 0, IDLE = 1, RETURNING = 2, TRASH = 3, FIRST_SLOT = 4;
const GLOW = 900; // milliseconds that a hit is seen
const EDGE = 7; // of the plate around the cells, in CSS pixels
const HEIGHT = 244; // the most, in CSS pixels
const LARGEST = 15; // the side of a cell in CSS pixels
const still = matchMedia("(prefers-reduced-motion: reduce)");

const GROUND = [16, 15, 13]; // the plate's own colour: the lines between cells
const BASE = { [FREE]: [36, 34, 30], [IDLE]: [112, 99, 73], [RETURNING]: [86, 52, 44], [TRASH]: [24, 23, 20] };
const LIGHT = [255, 250, 235];

/** sRGB of a colour in OKLCH (lightness 0..1, chroma, hue in degrees). */
function oklch(L, C, hue) {
  const a = C * Math.cos((hue * Math.PI) / 180), b = C * Math.sin((hue * Math.PI) / 180);
  const l = (L + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (L - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (L - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const linear = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  return linear.map((x) => {
    const y = Math.min(1, Math.max(0, x));
    return Math.round(255 * (y <= 0.0031308 ? 12.92 * y : 1.055 * y ** (1 / 2.4) - 0.055));
  });
}

const colours = new Map();

/** The colour of a slot: hues by the golden angle, so that neighbours differ; three lightnesses. */
export function slotColour(slot) {
  if (!colours.has(slot)) {
    colours.set(slot, oklch([0.74, 0.66, 0.82][slot % 3], [0.15, 0.16, 0.12][slot % 3], (32 + slot * 137.508) % 360));
  }
  return colours.get(slot);
}

export const css = (rgb) => `rgb(${rgb.join(" ")})`;
const mix = (from, to, share) => from.map((x, i) => Math.round(x + (to[i] - x) * share));

export class PageMap {
  constructor(group, tip) {
    this.cells = new Uint32Array(0);
    this.glow = new Map(); // cell: [since, strength]
    this.only = -1; // the one slot that is shown, where somebody points at its row
    this.slots = new Map();
    this.root = document.createElement("figure");
    this.root.className = "map";
    this.caption = document.createElement("figcaption");
    this.canvas = document.createElement("canvas");
    this.canvas.setAttribute("role", "img");
    this.plate = document.createElement("div");
    this.plate.className = "plate";
    this.plate.append(this.canvas);
    this.root.append(this.caption, this.plate);
    this.context = this.canvas.getContext("2d", { alpha: false });
    this.group = group;
    this.connect(tip);
    new ResizeObserver(() => this.layout()).observe(this.root);
  }

  connect(tip) {
    this.canvas.addEventListener("pointermove", (event) => {
      const text = this.tell(this.at(event.offsetX, event.offsetY));
      tip.hidden = !text;
      tip.textContent = text;
      const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
      tip.style.left = `${left}px`;
      tip.style.top = `${event.clientY + 18}px`;
    });
    this.canvas.addEventListener("pointerleave", () => (tip.hidden = true));
  }

  /** Take in a map of a view, and the slots' rows to tell who owns a cell. */
  take(map, slots) {
    this.slots = slots;
    this.facts = map;
    const changed = new Set();
    if (map.cells) {
      const bytes = Uint8Array.from(atob(map.cells), (c) => c.charCodeAt(0));
      const cells = new Uint32Array(bytes.buffer);
      const fresh = cells.length !== this.cells.length;
      if (!fresh) cells.forEach((cell, i) => cell !== this.cells[i] && changed.add(i));
      const before = this.cells;
      this.cells = cells;
      if (fresh) this.layout();
      else for (const i of changed) this.born(i, before[i], cells[i]);
    } else {
      map.at.forEach((cell, i) => {
        this.born(cell, this.cells[cell], map.to[i]);
        this.cells[cell] = map.to[i];
        changed.add(cell);
      });
    }
    const now = performance.now();
    for (const cell of map.hits) this.glow.set(cell, [now, 1]), changed.add(cell);
    for (const cell of changed) this.draw(cell, now);
    if (this.glow.size) this.animate();
    this.count();
  }

  born(cell, before, after) {
    if ((after & 0xffff) >= FIRST_SLOT && (before & 0xffff) < FIRST_SLOT) this.glow.set(cell, [performance.now(), 0.45]);
  }

  count() {
    const { pages, window: span, per_cell: perCell } = this.facts;
    let used = 0, idle = 0;
    for (const cell of this.cells) {
      used += cell >>> 24;
      if ((cell & 0xffff) === IDLE) idle += perCell;
    }
    const parts = [`${used.toLocaleString("en")} in use`, `${idle.toLocaleString("en")} kept`, `${(pages - 1).toLocaleString("en")} in all`];
    const name = this.group === null ? "Pages" : `Pages, ${span ? `window of ${span.toLocaleString("en")}` : "whole context"}`;
    if (perCell > 1) parts.push(`${perCell} a cell`);
    this.caption.replaceChildren(Object.assign(document.createElement("b"), { textContent: name }), parts.join(" · "));
    this.canvas.setAttribute("aria-label", `${name}: ${parts.join(", ")}`);
    Object.assign(this.root.dataset, { used, idle, pages: pages - 1 });
  }

  /** The largest cells with which the map fits. */
  layout() {
    const width = this.plate.clientWidth - 2 * EDGE, count = this.cells.length;
    if (!width || !count) return;
    const scale = devicePixelRatio || 1;
    let side = Math.floor(LARGEST * scale);
    while (side > 2 && Math.ceil(count / Math.floor((width * scale) / side)) * side > HEIGHT * scale) side--;
    this.side = side;
    this.scale = scale;
    this.columns = Math.max(1, Math.floor((width * scale) / side));
    const rows = Math.ceil(count / this.columns);
    this.canvas.width = this.columns * side;
    this.canvas.height = rows * side;
    this.canvas.style.width = `${(this.columns * side) / scale}px`;
    this.canvas.style.height = `${(rows * side) / scale}px`;
    this.drawAll();
  }

  drawAll() {
    this.context.fillStyle = css(GROUND);
    this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    const now = performance.now();
    for (let i = 0; i < this.cells.length; i++) this.draw(i, now);
  }

  colour(cell) {
    const value = this.cells[cell], owner = value & 0xffff;
    if (owner < FIRST_SLOT) return BASE[owner];
    let rgb = slotColour(owner - FIRST_SLOT);
    const perCell = this.facts?.per_cell ?? 1;
    if (perCell > 1) rgb = mix(BASE[FREE], rgb, 0.25 + (0.75 * (value >>> 24)) / perCell);
    return this.only >= 0 && owner - FIRST_SLOT !== this.only ? mix(BASE[FREE], rgb, 0.18) : rgb;
  }

  draw(cell, now) {
    if (!this.side) return;
    const x = (cell % this.columns) * this.side, y = Math.floor(cell / this.columns) * this.side;
    const gap = this.side >= 4 * this.scale ? Math.round(this.scale) : this.side >= 4 ? 1 : 0;
    const inner = this.side - gap;
    let rgb = this.colour(cell);
    const glow = this.glow.get(cell);
    if (glow) {
      const left = 1 - (now - glow[0]) / GLOW;
      if (left > 0) rgb = mix(rgb, LIGHT, glow[1] * (still.matches ? 1 : left));
      else this.glow.delete(cell);
    }
    this.context.fillStyle = css(rgb);
    this.context.fillRect(x, y, inner, inner);
    if (((this.cells[cell] >>> 16) & 0xff) > 1) {
      const dot = Math.max(1, Math.round(inner * 0.36)), at = Math.floor((inner - dot) / 2);
      this.context.fillStyle = css(LIGHT);
      this.context.fillRect(x + at, y + at, dot, dot);
    }
  }

  animate() {
    if (this.frame) return;
    const step = (now) => {
      for (const cell of this.glow.keys()) this.draw(cell, now);
      this.frame = this.glow.size ? requestAnimationFrame(step) : 0;
    };
    this.frame = requestAnimationFrame(step);
  }

  /** Show one slot's pages alone; -1 shows all. */
  focus(slot) {
    if (this.only === slot) return;
    this.only = slot;
    this.drawAll();
  }

  at(x, y) {
    const column = Math.floor((x * this.scale) / this.side), row = Math.floor((y * this.scale) / this.side);
    const cell = row * this.columns + column;
    return column < this.columns && cell < this.cells.length ? cell : -1;
  }

  tell(cell) {
    if (cell < 0) return "";
    const perCell = this.facts.per_cell, value = this.cells[cell], owner = value & 0xffff;
    const first = cell * perCell;
    const name = perCell > 1 ? `pages ${first} to ${first + perCell - 1}` : `page ${first}`;
    if (owner >= FIRST_SLOT) {
      const slot = owner - FIRST_SLOT, sharers = (value >>> 16) & 0xff;
      const who = this.slots.get(slot);
      const shared = sharers > 1 ? `, shared by ${sharers}` : "";
      return `${name} · slot ${slot}${shared}${who ? ` · ${who}` : ""}`;
    }
    return `${name} · ${["free", "kept for its prefix: nobody uses it now", "on its way back to the free stack", "the trash page: padding is read and written here"][owner]}`;
  }
}
