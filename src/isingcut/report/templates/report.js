"use strict";
(() => {
  const all = (query, root = document) => [...root.querySelectorAll(query)];
  const one = (query) => document.querySelector(query);
  const data = JSON.parse(one("#data").textContent);
  const live = one("#live");
  const tip = one(".tip");
  const round = (v, digits = 4) => String(+v.toPrecision(digits)).replace("-", "−");

  // Light and dark: the system's choice until the button is used.
  const root = document.documentElement;
  const button = one("#theme");
  const dark = () =>
    (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const name = () => {
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Change to ${dark() ? "light" : "dark"} colours`);
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    name();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
  name();

  // Values on hover and on focus.
  const place = (x, y) => {
    tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - tip.offsetWidth - 8))}px`;
    const below = y + 16 + tip.offsetHeight < innerHeight - 8;
    tip.style.top = `${Math.max(8, below ? y + 16 : y - tip.offsetHeight - 12)}px`;
  };
  const show = (text, x, y) => {
    tip.textContent = text;
    tip.hidden = false;
    place(x, y);
  };
  const hide = () => {
    tip.hidden = true;
  };

  // The block axis: one column in every figure.
  const n = data.n;
  const error = (v) => (v === undefined || v === null ? "" : ` ± ${round(v, 2)}`);
  const describe = {
    map(i, j, cell) {
      const state = data.states[+cell.closest("[data-state]").dataset.state];
      const gone = state.removed.includes(i);
      const own = data.h ? `\nalone it costs h = ${round(data.h[i])}` : "";
      return `${block(i)}\n${gone ? "removed" : "kept"} in ${state.name}${own}`;
    },
    h: (i) => `${block(i)}\nh = ${round(data.h[i])}${error(data.hError && data.hError[i])} ${data.unit}`,
    J(i, j) {
      if (i === j) return describe.h(i);
      const value = data.J[i][j];
      if (value === null) return `blocks ${i} and ${j}\nnot measured together`;
      const words = value < 0 ? "less than the two apart" : "more than the two apart";
      const sure = error(data.JError && data.JError[i][j]);
      return `blocks ${i} and ${j}\nJ = ${round(value)}${sure} ${data.unit}\ntogether they cost ${words}`;
    },
  };
  const block = (i) => `block ${i}${data.kinds[i] ? `, ${data.kinds[i]}` : ""}`;
  const point = (i, j) => {
    document.body.classList.add("pointing");
    for (const bar of all(".cursor")) bar.setAttribute("x", i);
    for (const bar of all(".cursor-row")) bar.setAttribute("y", j);
  };
  const leave = () => document.body.classList.remove("pointing");
  for (const area of all("[data-axis]")) {
    const kind = area.dataset.axis;
    const at = (event) => {
      const box = area.getBoundingClientRect();
      const along = (v, low, size) => Math.max(0, Math.min(n - 1, Math.floor(((v - low) / size) * n)));
      return [along(event.clientX, box.left, box.width), along(event.clientY, box.top, box.height)];
    };
    area.addEventListener("pointermove", (event) => {
      const [i, j] = at(event);
      point(i, kind === "J" ? j : -1);
      show(describe[kind](i, j, area), event.clientX, event.clientY);
    });
    area.addEventListener("pointerleave", () => {
      leave();
      hide();
    });
    if (kind === "map") continue;
    let [i, j] = [0, kind === "J" ? 1 : 0];
    const speak = () => {
      const box = area.getBoundingClientRect();
      const text = describe[kind](i, j, area);
      point(i, kind === "J" ? j : -1);
      show(text, box.left + ((i + 0.5) / n) * box.width, kind === "J" ? box.top + ((j + 0.5) / n) * box.height : box.bottom);
      live.textContent = text.replaceAll("\n", ", ");
    };
    area.addEventListener("focus", () => area.matches(":focus-visible") && speak());
    area.addEventListener("blur", () => {
      leave();
      hide();
    });
    area.addEventListener("keydown", (event) => {
      const step = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
      if (!step || (kind === "h" && step[1])) return;
      event.preventDefault();
      i = Math.max(0, Math.min(n - 1, i + step[0]));
      j = Math.max(0, Math.min(n - 1, j + step[1]));
      speak();
    });
  }

  for (const mark of all("[data-tip]")) {
    mark.addEventListener("pointerenter", (event) => show(mark.dataset.tip, event.clientX, event.clientY));
    mark.addEventListener("pointermove", (event) => place(event.clientX, event.clientY));
    mark.addEventListener("pointerleave", hide);
    mark.addEventListener("focus", () => {
      const box = mark.getBoundingClientRect();
      show(mark.dataset.tip, box.right, box.bottom);
    });
    mark.addEventListener("blur", hide);
  }

  // One stop of the Tab key per figure; arrows go from mark to mark.
  for (const group of all("[data-rove]")) {
    const stops = all(".mark, button", group);
    group.addEventListener("keydown", (event) => {
      const here = stops.indexOf(event.target);
      const next = { ArrowRight: here + 1, ArrowDown: here + 1, ArrowLeft: here - 1, ArrowUp: here - 1, Home: 0, End: stops.length - 1 }[event.key];
      if (here < 0 || next === undefined || !stops[next]) return;
      event.preventDefault();
      stops[here].setAttribute("tabindex", -1);
      stops[next].setAttribute("tabindex", 0);
      stops[next].focus();
    });
  }

  // A selected state is shown in every figure, and its blocks in the drawer.
  const drawer = one(".drawer");
  const line = (text) => {
    const p = document.createElement("p");
    p.textContent = text;
    return p;
  };
  const svg = (tag, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const facts = (state) => {
    const gone = state.removed;
    const lines = [`Removes ${gone.length} of ${n} blocks: ${gone.join(", ")}.`];
    if (state.kl !== null) {
      const se = state.se === null ? "" : ` ± ${state.se.toFixed(4)}`;
      lines.push(`Measured KL ${state.kl.toFixed(4)}${se} nats per token.`);
    }
    if (state.energy !== null && data.h) {
      const fields = sum(gone.map((i) => data.h[i]));
      const pairs = state.energy - fields - data.c;
      lines.push(`Energy ${round(state.energy)} ${data.unit} = own terms ${round(fields)} + couplings ${round(pairs)}${data.c ? ` + constant ${round(data.c)}` : ""}.`);
    }
    const counts = new Map();
    for (const i of gone) counts.set(data.kinds[i], (counts.get(data.kinds[i]) || 0) + 1);
    if (new Set(data.kinds).size > 1) {
      lines.push(`By kind: ${[...counts].map(([kind, count]) => `${count} ${kind}`).join(", ")}.`);
    }
    if (data.parameters.every((p) => p !== null)) {
      lines.push(`These blocks hold ${(sum(gone.map((i) => data.parameters[i])) / 1e6).toFixed(1)} million parameters.`);
    }
    return lines;
  };
  const outline = (removed) => {
    for (const group of all(".picks")) {
      group.replaceChildren(
        ...removed.flatMap((i) => removed.filter((j) => j !== i).map((j) => svg("rect", { class: "pick", x: j, y: i }))),
      );
    }
  };
  const select = (number) => {
    const state = number === null ? null : data.states[number];
    for (const element of all("[data-state]")) {
      const on = state !== null && +element.dataset.state === number;
      element.classList.toggle("on", on);
      const pressed = element.matches("tr") ? element.querySelector("button") : element;
      pressed.setAttribute("aria-pressed", on);
    }
    drawer.hidden = state === null;
    outline((state || data.states.find((s) => s.chosen) || { removed: [] }).removed);
    if (state === null) return;
    one("#drawer-name").textContent = state.name + (state.chosen ? " (chosen)" : "");
    const cells = svg("svg", { class: "strip", viewBox: `0 0 ${n} 1`, preserveAspectRatio: "none", "aria-hidden": "true" });
    for (let i = 0; i < n; i++) cells.append(svg("rect", { x: i + 0.07, class: state.removed.includes(i) ? "r" : "k" }));
    const lines = facts(state);
    one("#drawer-body").replaceChildren(cells, ...lines.map(line));
    live.textContent = `${state.name}. ${lines.join(" ")}`;
  };
  for (const element of all("[data-state]")) {
    element.addEventListener("click", () => select(+element.dataset.state));
    if (element.matches("tr")) continue;
    element.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      select(+element.dataset.state);
    });
  }
  one("#drawer-close").addEventListener("click", () => select(null));
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    hide();
    select(null);
  });

  // Wide models: the figures over the block axis scroll together.
  const synced = all(".synced");
  for (const box of synced) {
    box.addEventListener("scroll", () => {
      for (const other of synced) if (other.scrollLeft !== box.scrollLeft) other.scrollLeft = box.scrollLeft;
    });
  }
  addEventListener("beforeprint", () => {
    for (const details of all("#provenance details")) details.open = true;
  });
})();
