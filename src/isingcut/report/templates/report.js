"use strict";
(() => {
  const all = (query) => [...document.querySelectorAll(query)];
  const one = (query) => document.querySelector(query);
  const data = JSON.parse(one("#data").textContent);
  const n = data.n;
  const round = (v, digits = 4) => String(+v.toPrecision(digits)).replace("-", "−");
  const error = (v) => (v === undefined || v === null ? "" : ` ± ${round(v, 2)}`);
  const block = (i) => `block ${i}, ${data.kinds[i]}`;

  // What a figure over the block axis says of column i and row j.
  const describe = {
    map(i, j, cell) {
      const state = data.states[+cell.closest("[data-state]").dataset.state];
      const own = data.h ? `\nalone it costs h = ${round(data.h[i])}` : "";
      return `${block(i)}\n${state.removed.includes(i) ? "removed" : "kept"} in ${state.name}${own}`;
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
  const read = (area, event) => {
    const box = area.getBoundingClientRect();
    const along = (v, low, size) => Math.max(0, Math.min(n - 1, Math.floor(((v - low) / size) * n)));
    const i = along(event.clientX, box.left, box.width);
    const j = along(event.clientY, box.top, box.height);
    return describe[area.dataset.axis](i, j, area);
  };

  // Values under the pointer.
  const tip = one(".tip");
  const point = (event) => {
    const area = event.target.closest("[data-axis], [data-tip]");
    tip.hidden = area === null;
    if (area === null) return;
    tip.textContent = area.dataset.tip ?? read(area, event);
    tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8))}px`;
    const below = event.clientY + 24 + tip.offsetHeight < innerHeight;
    tip.style.top = `${Math.max(8, event.clientY + (below ? 16 : -12 - tip.offsetHeight))}px`;
  };
  for (const kind of ["pointermove", "pointerdown"]) document.addEventListener(kind, point);

  // A selected state is marked in every figure, and its pairs are outlined.
  const select = (number) => {
    const state = number === null ? data.states.find((s) => s.chosen) : data.states[number];
    for (const element of all("[data-state]")) {
      const on = element.dataset.state === String(number);
      element.classList.toggle("on", on);
      element.querySelector("button")?.setAttribute("aria-pressed", on);
    }
    const removed = state ? state.removed : [];
    const pairs = removed.flatMap((i) => removed.filter((j) => j !== i).map((j) => `M${j} ${i}h1v1h-1z`));
    for (const picks of all(".picks")) picks.setAttribute("d", pairs.join(""));
    one("#live").textContent = number === null ? "" : `${state.name} removes ${removed.join(", ")}`;
  };
  for (const element of all("[data-state]")) {
    element.addEventListener("click", () => select(element.classList.contains("on") ? null : +element.dataset.state));
  }
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    tip.hidden = true;
    select(null);
  });

  // Wide models: the figures over the block axis scroll together.
  for (const box of all(".synced")) {
    box.addEventListener("scroll", () => {
      for (const other of all(".synced")) if (other.scrollLeft !== box.scrollLeft) other.scrollLeft = box.scrollLeft;
    });
  }
})();
