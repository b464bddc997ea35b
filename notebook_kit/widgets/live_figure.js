// The one front end of the kit. It draws a `frame` (plotly traces whose arrays travel as binary buffers), puts
// controls beside it when the model has any, and asks for a new frame when a control moves.
//
// plotly.js is fetched from the kernel once per page and kept in globalThis. Heatmaps are painted on a canvas under
// plotly's axes, because a repaint there costs a few milliseconds at any size. The same file runs in an exported
// page, where a stand-in for the model answers from precomputed frames.

const PLOTLY = Symbol.for("notebook_kit.plotly");
const RETRY_MS = 8000;
const LIGHT = { text: "#222222", grid: "rgba(128,128,128,0.25)" };
const CONFIG = {
  responsive: false,
  displaylogo: false,
  displayModeBar: "hover",
  showSendToCloud: false,
  plotlyServerURL: "",
  showEditInChartStudio: false,
  modeBarButtonsToRemove: ["sendDataToCloud", "sendChartToCloud", "select2d", "lasso2d", "autoScale2d"],
};

// ---------------------------------------------------------------- plotly, once per page
function plotly(model) {
  const slot = (globalThis[PLOTLY] ??= {});
  slot.ready ??= new Promise((resolve) => (slot.resolve = resolve));
  const ask = () => slot.loaded || slot.loading || model.send({ kind: "plotly.js" });
  model.on("msg:custom", (message, buffers) => {
    if (message.kind === "plotly.js" && !slot.loaded && !slot.loading) {
      slot.loading = install(buffers[0]).then((library) => {
        slot.loaded = true;
        slot.resolve(library);
      });
      slot.loading.catch((error) => {
        slot.loading = null;
        console.error("notebook_kit: plotly.js did not load", error);
      });
    }
  });
  if (!slot.asked) {
    slot.asked = true;
    ask();
  }
  // The widget that was asked may have lost its kernel: whoever still waits asks again.
  const timer = setInterval(() => (slot.loaded ? clearInterval(timer) : ask()), RETRY_MS);
  slot.ready.then(() => clearInterval(timer));
  return slot.ready;
}

async function install(buffer) {
  const stream = new Blob([buffer]).stream().pipeThrough(new DecompressionStream("gzip"));
  const url = URL.createObjectURL(new Blob([await new Response(stream).blob()], { type: "text/javascript" }));
  const before = globalThis.Plotly;
  const define = globalThis.define; // an AMD loader on the page would swallow the library
  globalThis.define = undefined;
  try {
    await new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.onload = resolve;
      script.onerror = () => reject(new Error("the page's content policy refused a blob script"));
      script.src = url;
      document.head.append(script);
    });
  } finally {
    globalThis.define = define;
    URL.revokeObjectURL(url);
  }
  const library = globalThis.Plotly;
  if (before) globalThis.Plotly = before;
  return library;
}

// ---------------------------------------------------------------- frames
const ARRAYS = { f4: Float32Array, i4: Int32Array, u1: Uint8Array };

function arraysOf(frame) {
  return frame.arrays.map(({ dtype, shape }, i) => {
    const view = frame.buffers[i];
    const Kind = ARRAYS[dtype];
    const aligned = view.byteOffset % Kind.BYTES_PER_ELEMENT === 0;
    const flat = aligned
      ? new Kind(view.buffer, view.byteOffset, view.byteLength / Kind.BYTES_PER_ELEMENT)
      : new Kind(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
    return { flat, shape };
  });
}

function plain({ flat, shape }) {
  if (shape.length < 2) return flat;
  const [rows, columns] = shape;
  return Array.from({ length: rows }, (_, r) => flat.subarray(r * columns, (r + 1) * columns));
}

function rebuilt(node, arrays) {
  if (Array.isArray(node)) return node.map((item) => rebuilt(item, arrays));
  if (node === null || typeof node !== "object") return node;
  if ("$array" in node) return plain(arrays[node.$array]);
  return Object.fromEntries(Object.entries(node).map(([key, value]) => [key, rebuilt(value, arrays)]));
}

// ---------------------------------------------------------------- heatmaps on a canvas
const rgb = (text) => {
  if (text[0] === "#") return [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));
  return text.match(/[\d.]+/g).slice(0, 3).map(Number);
};

function lookup(scale) {
  const table = new Uint8Array(256 * 3);
  const stops = scale.map(([at, colour]) => [at, rgb(colour)]);
  for (let i = 0; i < 256; i++) {
    const t = i / 255;
    const upper = Math.max(1, stops.findIndex(([at]) => at >= t));
    const [[a, from], [b, to]] = [stops[upper - 1], stops[upper]];
    for (let c = 0; c < 3; c++) table[3 * i + c] = from[c] + ((to[c] - from[c]) * (t - a)) / (b - a || 1);
  }
  return table;
}

class Heat {
  constructor(trace, z) {
    this.trace = trace;
    this.axes = [trace.xaxis ?? "x", trace.yaxis ?? "y"].map((name) => name.replace(/^(.)/, "$1axis"));
    [this.rows, this.columns] = z.shape;
    this.table = lookup(trace.colorscale);
    this.image = document.createElement("canvas");
    this.image.width = Math.max(1, this.columns);
    this.image.height = Math.max(1, this.rows);
    this.fill(trace, z);
  }

  fill(trace, z) {
    this.trace = trace;
    this.z = z.flat;
    const { zmin, zmax } = trace;
    const context = this.image.getContext("2d");
    const pixels = context.createImageData(this.image.width, this.image.height);
    const words = new Uint32Array(pixels.data.buffer);
    const factor = 255 / (zmax - zmin || 1);
    if (!this.words) {
      this.words = new Uint32Array(256);
      for (let i = 0; i < 256; i++) {
        const [r, g, b] = this.table.subarray(3 * i, 3 * i + 3);
        this.words[i] = (255 << 24) | (b << 16) | (g << 8) | r;
      }
    }
    for (let i = 0; i < this.z.length; i++) {
      const value = this.z[i];
      const level = (value - zmin) * factor;
      words[i] = value !== value ? 0 : this.words[level < 0 ? 0 : level > 255 ? 255 : level | 0];
    }
    context.putImageData(pixels, 0, 0);
  }

  // Cell centres of an axis: its numbers when they are evenly spaced, else 0, 1, 2, ...
  static cells(values, count) {
    if (values && typeof values[0] === "number" && count > 1) return [values[0], values[1] - values[0]];
    if (values && typeof values[0] === "number") return [values[0], 1];
    return [0, 1];
  }

  axisLayout(values, count, existing, pixels, perLabel) {
    const [first, step] = Heat.cells(values, count);
    let range = [first - step / 2, first + (count - 0.5) * step];
    if (existing.autorange === "reversed") range = range.reverse();
    const layout = { ...existing, autorange: false, range: existing.range ?? range, showgrid: false, zeroline: false };
    if (values && typeof values[0] !== "number" && !existing.tickvals) {
      const every = Math.max(1, Math.ceil((count * perLabel) / Math.max(pixels, 1)));
      layout.tickmode = "array";
      layout.tickvals = [...Array(count).keys()].filter((i) => i % every === 0);
      layout.ticktext = layout.tickvals.map((i) => String(values[i]));
    }
    return layout;
  }

  // A trace that draws nothing but the colour bar.
  bar() {
    const { colorscale, zmin, zmax, colorbar, showscale = true, xaxis, yaxis } = this.trace;
    const marker = { color: [zmin], cmin: zmin, cmax: zmax, colorscale, showscale, colorbar, opacity: 0 };
    const still = { type: "scatter", mode: "markers", x: [null], y: [null], hoverinfo: "skip", showlegend: false };
    return { ...still, xaxis, yaxis, marker };
  }

  place(full) {
    const [x, y] = this.axes.map((name) => full[name]);
    const [x0, dx] = Heat.cells(this.trace.x, this.columns);
    const [y0, dy] = Heat.cells(this.trace.y, this.rows);
    return { x, y, x0, dx, y0, dy };
  }

  paint(context, full) {
    const { x, y, x0, dx, y0, dy } = this.place(full);
    const left = x._offset + x.l2p(x0 - dx / 2);
    const right = x._offset + x.l2p(x0 + (this.columns - 0.5) * dx);
    const first = y._offset + y.l2p(y0 - dy / 2);
    const last = y._offset + y.l2p(y0 + (this.rows - 0.5) * dy);
    context.save();
    context.beginPath();
    context.rect(x._offset, y._offset, x._length, y._length);
    context.clip();
    context.translate(left, first);
    context.scale((right - left) / this.columns, (last - first) / this.rows);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.image, 0, 0);
    context.restore();
  }

  // What lies under a pixel, as lines of text, or null.
  at(px, py, full) {
    const { x, y, x0, dx, y0, dy } = this.place(full);
    if (px < x._offset || px > x._offset + x._length || py < y._offset || py > y._offset + y._length) return null;
    const column = Math.round((x.p2l(px - x._offset) - x0) / dx);
    const row = Math.round((y.p2l(py - y._offset) - y0) / dy);
    if (column < 0 || row < 0 || column >= this.columns || row >= this.rows) return null;
    const name = (axis, values, i, fallback) =>
      `${axis.title?.text || fallback}: ${unescaped(String(values ? values[i] : i))}`;
    const value = this.z[row * this.columns + column];
    const label = this.trace.colorbar?.title?.text || "value";
    return [
      name(x, this.trace.x, column, "column"),
      name(y, this.trace.y, row, "row"),
      `${label}: ${Number.isNaN(value) ? "none" : Number(value.toPrecision(4))}`,
    ];
  }
}

// Labels are escaped for plotly, which reads some HTML; a tooltip is plain text.
const ENTITIES = { "&lt;": "<", "&gt;": ">", "&amp;": "&", "&#x27;": "'", "&quot;": '"' };
const unescaped = (text) => text.replace(/&(lt|gt|amp|#x27|quot);/g, (entity) => ENTITIES[entity]);

// ---------------------------------------------------------------- one picture
class Picture {
  constructor(model, { compact = false } = {}) {
    this.model = model;
    this.compact = compact;
    this.el = element("div", "nbk-picture");
    this.canvas = this.el.appendChild(document.createElement("canvas"));
    this.plot = this.el.appendChild(element("div", "nbk-plot"));
    this.tip = this.el.appendChild(element("div", "nbk-tip"));
    this.heats = [];
    this.plot.addEventListener("mousemove", (event) => this.hover(event));
    this.plot.addEventListener("mouseleave", () => (this.tip.hidden = true));
    this.tip.hidden = true;
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.el);
    this.chain = Promise.resolve();
  }

  show(frame) {
    this.next = frame;
    this.chain = this.chain
      .then(() => {
        if (!this.next || this.gone) return null;
        const latest = this.next;
        this.next = null;
        return this.draw(latest);
      })
      .catch((error) => console.error("notebook_kit:", error));
    return this.chain;
  }

  async draw(frame) {
    const library = (this.library ??= await plotly(this.model));
    if (this.gone || !frame.data) return;
    const arrays = arraysOf(frame);
    const same = this.frame?.id === frame.id && this.plot._fullLayout;
    this.frame = frame;
    if (same) await this.refill(library, frame, arrays);
    else await this.rebuild(library, frame, arrays);
    this.paint();
    this.el.dataset.drawn = String(Number(this.el.dataset.drawn ?? 0) + 1);
  }

  // Another figure: everything anew.
  async rebuild(library, frame, arrays) {
    const data = [];
    this.heats = [];
    for (const trace of frame.data) {
      if (trace.type === "heatmap" && "$array" in trace.z) {
        const heat = new Heat(rebuilt({ ...trace, z: null }, arrays), arrays[trace.z.$array]);
        this.heats.push(heat);
        data.push(heat.bar());
      } else data.push(rebuilt(trace, arrays));
    }
    const layout = this.layout(rebuilt(frame.layout, arrays));
    await library.react(this.plot, data, layout, { ...CONFIG, staticPlot: this.compact });
    if (!this.bound && this.plot.on) {
      this.bound = true;
      this.plot.on("plotly_relayout", () => this.paint());
      this.plot.on("plotly_relayouting", () => this.paint());
      this.plot.on("plotly_afterplot", () => this.paint());
    }
  }

  // The same figure with other numbers, the usual case: half the time of a rebuild; heatmaps alone need no plotly.
  async refill(library, frame, arrays) {
    const heats = [...this.heats];
    let stale = false;
    frame.data.forEach((trace, i) => {
      if (trace.type === "heatmap" && "$array" in trace.z) {
        heats.shift().fill(rebuilt({ ...trace, z: null }, arrays), arrays[trace.z.$array]);
      } else {
        Object.assign(this.plot.data[i], rebuilt(trace, arrays));
        stale = true;
      }
    });
    const title = frame.layout.title?.text ?? "";
    if (!this.compact && title !== (this.plot.layout.title?.text ?? "")) {
      this.plot.layout.title = this.title(frame.layout.title, this.plot.layout.width);
      stale = true;
    }
    if (stale) await library.redraw(this.plot);
  }

  // A long title gets smaller letters rather than being cut off: a letter is about half as wide as it is high.
  title(title, width) {
    const characters = (title?.text ?? "").length;
    if (!characters) return title;
    const size = Math.max(10, Math.min(title.font?.size ?? 15, (1.85 * width) / characters));
    return { ...title, font: { ...title.font, size } };
  }

  layout(layout) {
    const width = Math.max(160, this.el.clientWidth || 640);
    const height = this.compact ? 240 : (layout.height ?? 360);
    const colour = themeText(this.el);
    const out = { uirevision: "keep", ...layout, width, height, font: { ...layout.font, color: colour } };
    out.title = this.title(layout.title, width);
    if (this.compact) {
      out.font = { ...out.font, size: 10 };
      out.title = { ...out.title, text: "" };
      out.margin = { ...out.margin, t: 12, l: 48, r: 8, b: 40 };
      out.showlegend = false;
    }
    for (const heat of this.heats) {
      const [xname, yname] = heat.axes;
      const [x, y] = [out[xname] ?? {}, out[yname] ?? {}];
      const span = (axis, pixels) => (axis.domain ? axis.domain[1] - axis.domain[0] : 1) * pixels;
      const longest = Math.max(3, ...(heat.trace.x ?? []).slice(0, 400).map((text) => String(text).length));
      const perLabel = Math.min(7 * longest + 8, 18);
      out[xname] = heat.axisLayout(heat.trace.x, heat.columns, x, span(x, width - 130), perLabel);
      out[yname] = heat.axisLayout(heat.trace.y, heat.rows, y, span(y, height - 100), 13);
    }
    return out;
  }

  paint() {
    const full = this.plot._fullLayout;
    if (!this.heats.length || !full) {
      this.canvas.hidden = true;
      return;
    }
    const ratio = globalThis.devicePixelRatio || 1;
    const [width, height] = [full.width, full.height];
    this.canvas.hidden = false;
    if (this.canvas.width !== width * ratio || this.canvas.height !== height * ratio) {
      Object.assign(this.canvas, { width: width * ratio, height: height * ratio });
      Object.assign(this.canvas.style, { width: `${width}px`, height: `${height}px` });
    }
    const context = this.canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    for (const heat of this.heats) heat.paint(context, full);
  }

  hover(event) {
    const full = this.plot._fullLayout;
    const box = this.plot.getBoundingClientRect();
    const [px, py] = [event.clientX - box.left, event.clientY - box.top];
    const lines = full && this.heats.map((heat) => heat.at(px, py, full)).find(Boolean);
    this.tip.hidden = !lines;
    if (!lines) return;
    this.tip.textContent = lines.join("\n");
    const left = px > box.width * 0.6 ? px - this.tip.offsetWidth - 12 : px + 14;
    Object.assign(this.tip.style, { left: `${left}px`, top: `${py + 14}px` });
  }

  recolour() {
    if (this.plot._fullLayout) this.library.relayout(this.plot, { "font.color": themeText(this.el) });
  }

  resize() {
    const width = this.el.clientWidth;
    if (!width || !this.plot._fullLayout || Math.abs(width - this.plot._fullLayout.width) < 2) return;
    clearTimeout(this.pending);
    this.pending = setTimeout(() => {
      if (!this.gone) this.library.relayout(this.plot, { width }).then(() => this.paint());
    }, 60);
  }

  dispose() {
    this.gone = true;
    this.observer.disconnect();
    if (this.library && this.plot._fullLayout) this.library.purge(this.plot);
  }
}

function themeText(el) {
  const colour = getComputedStyle(el).color;
  return colour && colour !== "rgba(0, 0, 0, 0)" ? colour : LIGHT.text;
}

// ---------------------------------------------------------------- controls
function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

const POSITIONS = 100;
const short = (value) => (Number.isInteger(value) ? value : Number(Number(value).toPrecision(4)));

class Scale {
  constructor({ kind, low, high, step, log }) {
    Object.assign(this, { kind, low, high, log });
    if (kind === "int" && !(log && high - low > POSITIONS)) this.count = Math.round((high - low) / (step || 1));
    else if (step && !log) this.count = Math.round((high - low) / step);
    else this.count = POSITIONS;
    this.count = Math.max(1, this.count);
  }

  value(position) {
    const t = position / this.count;
    const raw = this.log ? this.low * (this.high / this.low) ** t : this.low + (this.high - this.low) * t;
    return this.kind === "int" ? Math.round(raw) : short(raw);
  }

  position(value) {
    const t = this.log
      ? Math.log(value / this.low) / Math.log(this.high / this.low || Math.E)
      : (value - this.low) / (this.high - this.low || 1);
    return Math.round(t * this.count);
  }
}

function control(spec, read, write) {
  const row = element("label", "nbk-control");
  row.title = spec.help || "";
  row.append(element("span", "nbk-name", spec.label));
  const { name } = spec;
  let sync;
  if (spec.kind === "choice") {
    const select = row.appendChild(element("select"));
    spec.options.forEach((option, i) => select.append(new Option(String(option), i)));
    select.onchange = () => write(name, spec.options[select.value], false);
    sync = () => (select.value = spec.options.findIndex((option) => option === read(name)));
  } else if (spec.kind === "bool") {
    const box = row.appendChild(element("input"));
    box.type = "checkbox";
    box.onchange = () => write(name, box.checked, false);
    sync = () => (box.checked = Boolean(read(name)));
  } else {
    const scale = new Scale(spec);
    const slider = row.appendChild(element("input", "nbk-slider"));
    const number = row.appendChild(element("input", "nbk-number"));
    Object.assign(slider, { type: "range", min: 0, max: scale.count, step: 1 });
    Object.assign(number, { type: "number", min: spec.low, max: spec.high, step: "any" });
    slider.setAttribute("aria-label", spec.label);
    number.setAttribute("aria-label", `${spec.label}, exact`);
    const typed = () => {
      const value = Math.min(spec.high, Math.max(spec.low, Number(number.value)));
      if (number.value !== "" && !Number.isNaN(value)) write(name, spec.kind === "int" ? Math.round(value) : value, false);
    };
    slider.oninput = () => {
      number.value = scale.value(slider.valueAsNumber);
      write(name, scale.value(slider.valueAsNumber), true);
    };
    slider.onchange = () => write(name, scale.value(slider.valueAsNumber), false);
    number.onchange = typed;
    let toggle = null;
    if (spec.optional) {
      toggle = element("input", "nbk-toggle");
      toggle.type = "checkbox";
      toggle.title = "on or off";
      row.insertBefore(toggle, slider);
      toggle.onchange = () => write(name, toggle.checked ? scale.value(slider.valueAsNumber) : null, false);
    }
    sync = () => {
      const value = read(name);
      const off = value === null || value === undefined;
      slider.disabled = number.disabled = off;
      if (toggle) toggle.checked = !off;
      number.value = off ? "" : short(value);
      if (!off && document.activeElement !== slider) slider.value = scale.position(value);
    };
  }
  const disable = spec.fixed ? (row.querySelectorAll("input,select").forEach((node) => (node.disabled = true)), true) : false;
  return { row, sync: disable ? () => {} : sync, start: sync };
}

function button(text, title, act) {
  const node = element("button", "nbk-button", text);
  node.type = "button";
  node.title = title;
  node.onclick = act;
  return node;
}

// ---------------------------------------------------------------- the view
function render({ model, el }) {
  el.classList.add("nbk");
  // Arrow keys belong to the slider that has the focus, not to the notebook's command mode.
  el.dataset.lmSuppressShortcuts = "true";
  el.addEventListener("keydown", (event) => event.stopPropagation());
  const main = el.appendChild(element("div", "nbk-main"));
  const specs = model.get("controls") || [];
  const listeners = [];
  const on = (event, act) => {
    model.on(event, act);
    listeners.push([event, act]);
  };

  let syncs = [];
  const write = (name, value, dragging) => {
    const settings = model.get("settings");
    if (settings[name] === value && model.get("dragging") === dragging) return;
    model.set("settings", { ...settings, [name]: value });
    model.set("dragging", dragging);
    el.classList.add("nbk-waiting"); // before the change goes out: a page without a kernel answers at once
    model.save_changes();
  };
  if (specs.length) {
    const panel = main.appendChild(element("div", "nbk-controls"));
    for (const spec of specs) {
      const { row, sync, start } = control(spec, (name) => model.get("settings")[name], write);
      panel.append(row);
      start();
      syncs.push(sync);
    }
    const buttons = panel.appendChild(element("div", "nbk-buttons"));
    if (model.get("can_pin")) {
      buttons.append(button("Pin", "Keep this picture below, to compare", () => model.send({ kind: "pin" })));
      buttons.append(button("Reset", "Back to the defaults", () => model.send({ kind: "reset" })));
    }
    on("change:settings", () => syncs.forEach((sync) => sync()));
  }

  const stage = main.appendChild(element("div", "nbk-stage"));
  stage.append(element("div", "nbk-busy"));
  const picture = new Picture(model);
  stage.append(picture.el);
  const draw = () => {
    el.classList.remove("nbk-waiting");
    if (model.get("frame")?.data) picture.show(model.get("frame"));
  };
  on("change:frame", draw);

  if (specs.length) {
    const status = el.appendChild(element("div", "nbk-status"));
    const code = element("code", "nbk-code");
    const info = element("span", "nbk-info");
    status.append(
      code,
      button("Copy", "Copy this line of Python", () => navigator.clipboard?.writeText(model.get("code"))),
      info,
    );
    const tell = () => {
      code.textContent = model.get("code");
      info.textContent = model.get("note");
    };
    on("change:code", tell);
    on("change:note", () => {
      el.classList.remove("nbk-waiting");
      tell();
    });
    tell();
  }

  const problem = el.appendChild(element("details", "nbk-error"));
  const complain = () => {
    const error = model.get("error");
    problem.hidden = !error?.message;
    if (problem.hidden) return;
    el.classList.remove("nbk-waiting");
    problem.replaceChildren(element("summary", "", error.message), element("pre", "", error.traceback));
  };
  on("change:error", complain);
  complain();

  const shelf = el.appendChild(element("div", "nbk-shelf"));
  let pinned = [];
  const pins = () => {
    pinned.forEach((old) => old.dispose());
    shelf.replaceChildren();
    pinned = (model.get("pins") || []).map((pin, i) => {
      const card = shelf.appendChild(element("figure", "nbk-pin"));
      const caption = card.appendChild(element("figcaption", "", pin.label));
      caption.append(button("×", "Remove", () => model.send({ kind: "unpin", index: i })));
      const small = new Picture(model, { compact: true });
      card.append(small.el);
      small.show(pin.frame);
      return small;
    });
  };
  on("change:pins", pins);
  pins();

  const theme = new MutationObserver(() => requestAnimationFrame(() => [picture, ...pinned].forEach((p) => p.recolour())));
  theme.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-name", "data-theme", "class"] });
  draw();

  return () => {
    listeners.forEach(([event, act]) => model.off(event, act));
    theme.disconnect();
    [picture, ...pinned].forEach((old) => old.dispose());
  };
}

export default { render };
