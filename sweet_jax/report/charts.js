"use strict";
// Draws a chart as inline SVG: axes, lines, bands, markers, and a legend that shows or hides traces.
// spec: {title, x, y, traces, zero, top: {title, points: [[x, value]]}, height, square, legend};
// traces are those of traces.py. Returns {update(changes), traces}, also kept as element.chart.

const SVG = "http://www.w3.org/2000/svg";
const DASHES = {solid: "", dot: "1 4", dash: "6 4", dashdot: "8 3 1 3", longdash: "14 5",
  dashdotdot: "10 4 1 4 1 4"};
const MARKS = {  // paths of radius 1
  circle: "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0 -2 0Z",
  ring: "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0 -2 0Z",
  square: "M-.85-.85h1.7v1.7h-1.7Z",
  diamond: "M0-1.2 1 0 0 1.2-1 0Z",
  "triangle-up": "M0-1.1 1 .8h-2Z",
  star: "M0-1.2 .3-.4 1.1-.4 .5.1 .7 1 0 .5-.7 1-.5.1-1.1-.4-.3-.4Z",
  x: "M-1-.6-.6-1 0-.4 .6-1 1-.6 .4 0 1 .6 .6 1 0 .4-.6 1-1 .6-.4 0Z",
  cross: "M-.35-1h.7v.65h.65v.7h-.65v.65h-.7v-.65h-.65v-.7h.65Z",
};

// Dark mode has lighter colors of the same names.
const paint = color => `var(--c-${color.slice(1)}, ${color})`;

function node(parent, name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

// Returns about `count` round numbers between low and high, with their text.
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find(s => s * power >= rough) * power;
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9) + (step / power === 2.5 ? 1 : 0));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
    found.push([i * step, (i * step).toFixed(digits)]);
  }
  return found;
}

function bounds(values, zero, pad) {
  let [low, high] = [Infinity, -Infinity];
  for (const v of values) if (v !== null) { low = Math.min(low, v); high = Math.max(high, v); }
  if (!(low <= high)) return [0, 1];
  if (zero) low = Math.min(low, 0);
  const room = (high - low) * pad || 0.05;
  return [low - room, high + room];
}

function chart(element, spec) {
  const traces = spec.traces.map(trace => ({...trace}));
  element.classList.add("chart");
  element.replaceChildren();
  const svg = node(element, "svg", {role: "img", "aria-label": spec.title});
  const legend = document.createElement("div"), tip = document.createElement("div");
  legend.className = "legend";
  tip.className = "tip";
  tip.hidden = true;
  element.append(legend, tip);
  let drawn = null, keys = [], groups = [], points = [];  // groups and points of each trace: SVG group, [pixel x, pixel y, index]
  let wide = element.clientWidth;  // cached, since reading it triggers a layout of the page

  function frame() {
    const width = Math.max(240, wide), height = spec.height || (spec.square ? width : 400);
    const shown = traces.filter(trace => !trace.hidden && trace.x.length);
    const all = name => shown.flatMap(trace => [...(trace[name] || [])]);
    const x = spec.square ? [0, 1] : bounds(all("x"), spec.zero, 0.02);
    const y = spec.square ? [0, 1] : bounds([...all("y"), ...all("low")], false, 0.05);
    const [left, right, above, below] = [58, width - 14, spec.top ? 52 : 12, height - 44];
    return {
      width, height, shown, x, y, left, right, above, below,
      px: v => left + (v - x[0]) / (x[1] - x[0]) * (right - left),
      py: v => below - (v - y[0]) / (y[1] - y[0]) * (below - above),
    };
  }

  function axes(f) {
    const text = (x, y, words, anchor = "middle") => node(svg, "text", {x, y, "text-anchor": anchor}, words);
    for (const [value, words] of ticks(...f.x, f.width < 500 ? 4 : 8)) {
      node(svg, "line", {class: "grid", x1: f.px(value), x2: f.px(value), y1: f.above, y2: f.below});
      text(f.px(value), f.below + 17, words);
    }
    for (const [value, words] of ticks(...f.y, 5)) {
      node(svg, "line", {class: "grid", x1: f.left, x2: f.right, y1: f.py(value), y2: f.py(value)});
      text(f.left - 7, f.py(value) + 4, words, "end");
    }
    text((f.left + f.right) / 2, f.height - 6, spec.x);
    const side = text(0, 0, spec.y);
    side.setAttribute("transform", `translate(13 ${(f.above + f.below) / 2}) rotate(-90)`);
    if (!spec.top) return;
    text((f.left + f.right) / 2, 14, spec.top.title);
    let free = -Infinity;  // labels of exits close to each other would overlap
    for (const [at, value] of spec.top.points) {
      node(svg, "line", {class: "tick", x1: f.px(at), x2: f.px(at), y1: f.above - 6, y2: f.above});
      if (f.px(at) < free) continue;
      text(f.px(at), f.above - 12, value.toPrecision(3));
      free = f.px(at) + 34;
    }
    node(svg, "line", {class: "tick", x1: f.px(spec.top.points[0][0]), x2: f.px(spec.top.points.at(-1)[0]), y1: f.above, y2: f.above});
  }

  function line(f, trace, ys) {
    let path = "", before = null;
    trace.x.forEach((x, i) => {
      if (ys[i] === null) return;
      const [h, v] = [f.px(x).toFixed(1), f.py(ys[i]).toFixed(1)];
      path += before === null ? `M${h} ${v}` : trace.steps ? `H${h}V${v}` : `L${h} ${v}`;
      before = v;
    });
    return path;
  }

  function draw() {
    drawn = frame();
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${drawn.width} ${drawn.height}`);
    axes(drawn);
    groups = traces.map(() => node(svg, "g", {}));
    traces.forEach((_, number) => drawTrace(drawn, number));
  }

  function drawTrace(f, number) {
    const trace = traces[number], group = groups[number], color = paint(trace.color);
    group.replaceChildren();
    points[number] = [];
    if (keys[number]) keys[number].hidden = !trace.x.length;
    if (!f.shown.includes(trace)) return;
    if (trace.low.length) {
      const back = {...trace, x: [...trace.x].reverse()};
      const top = line(f, trace, trace.y), edge = line(f, back, [...trace.low].reverse()).replace("M", "L");
      if (top) node(group, "path", {d: `${top}${edge}Z`, fill: color, opacity: 0.18});
      return;
    }
    if (trace.dash) {
      node(group, "path", {d: line(f, trace, trace.y), fill: "none", stroke: color,
        "stroke-width": trace.width, "stroke-dasharray": DASHES[trace.dash], "stroke-linecap": "round"});
    }
    trace.x.forEach((x, i) => {
      if (trace.y[i] === null) return;
      const [h, v] = [f.px(x), f.py(trace.y[i])];
      if (trace.symbol) mark(group, trace, h, v);
      points[number].push([h, v, i]);
    });
  }

  function describe(trace, i) {
    const words = trace.text && trace.text[i] || trace.name;
    return `${words}: ${spec.x.split(" ")[0]} ${trace.x[i].toFixed(3)}, ${trace.y[i].toFixed(4)}`;
  }

  function mark(parent, trace, h, v) {
    const size = trace.size / 2, ring = trace.symbol === "ring", color = paint(trace.color);
    return node(parent, "path", {d: MARKS[trace.symbol], transform: `translate(${h.toFixed(1)} ${v.toFixed(1)}) scale(${size})`,
      fill: ring ? "none" : color, stroke: ring ? color : "none", "stroke-width": ring ? 2.5 / size : 0});
  }

  function key(trace) {
    const button = document.createElement("button");
    button.type = "button";
    const show = () => button.setAttribute("aria-pressed", String(!trace.hidden));
    const icon = node(button, "svg", {viewBox: "0 0 24 12", "aria-hidden": "true"});
    if (trace.low.length) node(icon, "rect", {y: 1, width: 24, height: 10, fill: paint(trace.color), opacity: 0.3});
    else if (trace.dash) node(icon, "line", {x1: 0, x2: 24, y1: 6, y2: 6, stroke: paint(trace.color), "stroke-width": 2, "stroke-dasharray": DASHES[trace.dash]});
    if (trace.symbol) mark(icon, {...trace, size: Math.min(trace.size, 9)}, 12, 6);
    button.append(trace.name);
    button.addEventListener("click", () => { trace.hidden = !trace.hidden; show(); draw(); });
    show();
    return button;
  }

  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), [h, v] = [event.clientX - box.left, event.clientY - box.top];
    let best = null, least = 30 ** 2;
    points.forEach((own, number) => {
      for (const point of own) {
        const distance = (point[0] - h) ** 2 + (point[1] - v) ** 2;
        if (distance < least) [best, least] = [[...point, traces[number]], distance];
      }
    });
    tip.hidden = best === null;
    if (!best) return;
    tip.textContent = describe(best[3], best[2]);
    tip.style.top = `${best[1] + 12}px`;
    tip.style.left = `${Math.min(best[0], Math.max(0, element.clientWidth - tip.offsetWidth))}px`;
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; });
  if (spec.legend !== false) keys = traces.map(trace => trace.name && key(trace));
  legend.append(...keys.filter(Boolean));
  new ResizeObserver(() => {
    if (element.clientWidth !== wide) { wide = element.clientWidth; draw(); }
  }).observe(element);
  draw();
  element.chart = {
    traces,
    update(changes) {  // {index of a trace: {x, y, text}}, drawn once
      for (const [number, values] of Object.entries(changes)) Object.assign(traces[number], values);
      const f = frame(), same = [...f.x, ...f.y].every((v, i) => v === [...drawn.x, ...drawn.y][i]);
      if (!same) return draw();
      drawn = f;
      for (const number of Object.keys(changes)) drawTrace(f, number);
    },
  };
  return element.chart;
}
