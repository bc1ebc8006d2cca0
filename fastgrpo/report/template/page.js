"use strict";
// Reads values out of the charts, and shows completions. Texts of models only ever become text nodes.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const PAGE_OF_CARDS = 24;

  const make = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const inSvg = (tag, attributes) => {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };
  const digits = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && size < 1e-3) return value.toExponential(3).replace(/\.?0*e/, "e");
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    return String(Number(value.toPrecision(4)));
  };

  // ---- charts
  class Chart {
    constructor(figure) {
      this.figure = figure;
      this.data = JSON.parse(figure.querySelector("script").textContent);
      this.plot = figure.querySelector(".plot");
      this.cursor = figure.querySelector(".cursor");
      this.outputs = [...figure.querySelectorAll(".legend data")];
      this.at = figure.querySelector(".at");
      this.last = this.data.x.length - 1;
      this.index = null;
    }
    text(value) {
      if (value === null || value === undefined) return "–";
      return this.data.percent ? `${digits(100 * value)}%` : digits(value);
    }
    nearest(x) {
      const xs = this.data.x;
      let best = 0;
      for (let i = 1; i < xs.length; i++) if (Math.abs(xs[i] - x) < Math.abs(xs[best] - x)) best = i;
      return best;
    }
    show(index) {
      const bars = this.data.style === "bars";
      this.index = index;
      const i = index ?? this.last;
      this.at.textContent = bars && index === null ? "" : (index === null ? "last: " : "") + this.data.labels[i];
      this.data.series.forEach((series, k) => {
        const value = series.values[i];
        const output = this.outputs[k];
        output.value = value ?? "";
        output.textContent = bars && index === null ? "" : this.text(value);
        const low = series.low?.[i], high = series.high?.[i];
        if (value !== null && low != null && high != null && low !== high && !(bars && index === null))
          output.textContent += ` (${this.text(low)} to ${this.text(high)})`;
      });
      this.mark(index);
    }
    mark(index) {
      this.cursor.replaceChildren();
      if (index === null) return;
      const { top, bottom, low, high } = this.data.heights;
      const x = this.data.x[index];
      this.cursor.append(inSvg("path", { d: `M${x} ${top}V${bottom}` }));
      if (this.data.style === "bars" || this.data.style === "areas") return;
      this.data.series.forEach((series) => {
        const value = series.values[index];
        if (value === null) return;
        const y = bottom - ((value - low) / (high - low)) * (bottom - top);
        this.cursor.append(inSvg("circle", { class: `s${series.colour}`, cx: x, cy: y, r: 4.5 }));
      });
    }
  }

  const charts = [...document.querySelectorAll("figure.chart")].filter((f) => f.querySelector("script")).map((f) => new Chart(f));
  // Charts over the same steps are read at the same step.
  const alike = new Map();
  for (const chart of charts) {
    const key = chart.data.style === "bars" ? chart.figure : chart.data.labels.join();
    alike.set(key, [...(alike.get(key) ?? []), chart]);
    chart.group = alike.get(key);
  }
  const showAll = (chart, index) => alike.forEach((group) => group.includes(chart) && group.forEach((c) => c.show(index)));
  for (const chart of charts) {
    chart.show(null);
    const read = (event) => {
      const box = chart.plot.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * chart.plot.viewBox.baseVal.width;
      showAll(chart, chart.nearest(x));
    };
    chart.plot.addEventListener("pointermove", read);
    chart.plot.addEventListener("pointerdown", read);
    chart.plot.addEventListener("pointerleave", () => showAll(chart, null));
    chart.figure.addEventListener("blur", () => showAll(chart, null));
    chart.figure.addEventListener("focus", () => (chart.at.ariaLive = "polite"));
    chart.figure.addEventListener("keydown", (event) => {
      const at = chart.index ?? chart.last;
      const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: chart.last }[event.key];
      if (event.key === "Escape") showAll(chart, null);
      if (to === undefined) return;
      event.preventDefault();
      showAll(chart, Math.min(Math.max(to, 0), chart.last));
    });
  }

  // ---- completions
  const source = document.getElementById("completion-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const field = (id) => document.getElementById(id);
  const [step, sort, show, text] = ["step", "sort", "show", "text"].map(field);
  const orders = [["as sampled", null], ["advantage, highest first", (c) => c.advantage]];
  for (const name of data.rewards) orders.push([`${name}, highest first`, (c) => c.rewards[name]]);
  for (const name of data.rewards) orders.push([`${name}, lowest first`, (c) => (c.rewards[name] == null ? null : -c.rewards[name])]);
  const length = (c) => c.num_tokens ?? c.completion.reduce((n, turn) => n + turn.text.length, 0);
  orders.push(["longest first", length], ["shortest first", (c) => -length(c)]);
  orders.forEach(([name], i) => {
    const option = make("option", "", name);
    option.value = i;
    sort.append(option);
  });
  const filters = {
    "": () => true,
    better: (c) => c.advantage > 0,
    worse: (c) => c.advantage < 0,
    truncated: (c) => c.finished === false,
    finished: (c) => c.finished === true,
  };
  // Control characters as their pictures, and what would reorder text as its number.
  const visible = (value) =>
    value
      .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
      .replace(/\u007f/g, "\u2421")
      .replace(/[\u0080-\u009f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g, (c) => `⟨U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
  const block = (turns, label) => {
    const parts = [make("h3", "", label)];
    for (const turn of turns) {
      if (turn.role) parts.push(make("div", "role", visible(turn.role)));
      const pre = make("pre", "", visible(turn.text) || "(empty)");
      pre.dir = "auto";
      pre.tabIndex = 0;
      parts.push(pre);
    }
    return parts;
  };
  const card = (c) => {
    const node = make("article", "card");
    const head = make("header");
    head.append(make("span", "", `step ${c.step}`));
    if (c.advantage !== undefined) {
      const advantage = make("span", "", "advantage ");
      advantage.append(make("b", "", (c.advantage > 0 ? "+" : "") + digits(c.advantage)));
      if (c.per_token !== undefined) advantage.append(` (mean of ${c.per_token} tokens)`);
      head.append(advantage);
    }
    if (c.num_tokens !== undefined) head.append(make("span", "", `${c.num_tokens.toLocaleString("en")} tokens`));
    if (c.num_tool_tokens) head.append(make("span", "", `${c.num_tool_tokens.toLocaleString("en")} of tools`));
    if (c.finished !== undefined) head.append(make("span", c.finished ? "" : "cut", c.finished ? "finished" : "truncated"));
    const scores = make("ul", "scores");
    for (const [name, value] of Object.entries(c.rewards)) {
      const item = make("li", "", `${visible(name)} `);
      item.append(make("b", "", value === null ? "not judged" : digits(value)));
      scores.append(item);
    }
    node.append(head, scores, ...block(data.prompts[c.prompt], "Prompt"), ...block(c.completion, "Completion"));
    for (const [name, value] of Object.entries(c.extra ?? {})) node.append(...block([{ role: "", text: value }], visible(name)));
    return node;
  };
  // Of a long text the part below is a click away, also where scroll bars hide.
  const openable = (pre) => {
    if (pre.scrollHeight <= pre.clientHeight + 1) return;
    const button = make("button", "", "Show all of it");
    button.type = "button";
    button.addEventListener("click", () => {
      button.textContent = pre.classList.toggle("open") ? "Show less of it" : "Show all of it";
    });
    pre.after(button);
  };
  let room = PAGE_OF_CARDS;
  const update = () => {
    const wanted = text.value.toLowerCase();
    const has = (turns) => turns.some((turn) => turn.text.toLowerCase().includes(wanted));
    const found = data.completions.filter(
      (c) =>
        (step.value === "" || c.step === Number(step.value)) &&
        filters[show.value](c) &&
        (!wanted || has(c.completion) || has(data.prompts[c.prompt])),
    );
    const by = orders[sort.value][1];
    if (by) found.sort((a, b) => (by(b) ?? -Infinity) - (by(a) ?? -Infinity) || 0);
    field("count").textContent = `${found.length.toLocaleString("en")} completion${found.length === 1 ? "" : "s"}`;
    field("cards").replaceChildren(...found.slice(0, room).map(card));
    field("cards").querySelectorAll("pre").forEach(openable);
    field("more").hidden = found.length <= room;
    field("earlier").disabled = step.selectedIndex <= 1;
    field("later").disabled = step.selectedIndex === step.options.length - 1;
  };
  const restart = () => {
    room = PAGE_OF_CARDS;
    update();
  };
  const move = (by) => {
    step.selectedIndex = Math.min(Math.max(step.selectedIndex + by, 1), step.options.length - 1);
    restart();
  };
  for (const control of [step, sort, show]) control.addEventListener("change", restart);
  text.addEventListener("input", restart);
  field("browser").addEventListener("submit", (event) => event.preventDefault());
  field("earlier").addEventListener("click", () => move(-1));
  field("later").addEventListener("click", () => move(1));
  field("more").addEventListener("click", () => {
    room += PAGE_OF_CARDS;
    update();
  });
  update();
})();
