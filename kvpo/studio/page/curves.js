// Curves as small SVG pictures: lines over the steps of a run, with a legend of their last values.

const SPACE = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [320, 160, 46, 8, 8, 22];
const COLOURS = 6;

export function shown(value) {
  if (value === null || value === undefined) return "not measured";
  const size = Math.abs(value);
  return size !== 0 && (size < 0.001 || size >= 10000) ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

function svg(name, facts, ...children) {
  const element = document.createElementNS(SPACE, name);
  for (const [key, value] of Object.entries(facts)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// Range of the values and steps of charts that are to be read beside each other.
export function rangeOf(charts) {
  const points = charts.flatMap((chart) => chart.lines.flatMap((line) => line.points)).filter(([, value]) => value !== null);
  const [values, steps] = [points.map(([, value]) => value), points.map(([step]) => step)];
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (!points.length) [low, high] = [0, 1];
  if (low === high) { low -= Math.abs(low) / 10 || 1; high += Math.abs(high) / 10 || 1; }
  return { low, high, first: Math.min(...steps, Infinity), last: Math.max(...steps, -Infinity) };
}

function path(points, x, y) {
  let [text, open] = ["", false];
  for (const [step, value] of points) {
    if (value === null) { open = false; continue; }
    text += `${open ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`;
    if (!open) text += "h.01";   // a point alone among gaps is seen as well
    open = true;
  }
  return text;
}

export function picture(chart, range) {
  const span = range.last - range.first || 1;
  const x = (step) => LEFT + (step - range.first) / span * (WIDTH - LEFT - RIGHT);
  const y = (value) => TOP + (range.high - value) / (range.high - range.low) * (HEIGHT - TOP - BOTTOM);
  const lines = chart.lines.map((line, i) => svg("path", { class: `curve line-${i % COLOURS + 1}`, d: path(line.points, x, y) }));
  const ends = chart.lines.map((line, i) => [line.points.findLast(([, value]) => value !== null), i]).filter(([point]) => point)
    .map(([[step, value], i]) => svg("circle", { class: `dot line-${i % COLOURS + 1}`, cx: x(step), cy: y(value), r: 1.5 }));
  const axis = svg("path", { class: "axis", d: `M${LEFT} ${TOP}V${HEIGHT - BOTTOM}H${WIDTH - RIGHT}` });
  const zero = range.low < 0 && range.high > 0 ? [svg("path", { class: "zero", d: `M${LEFT} ${y(0)}H${WIDTH - RIGHT}` })] : [];
  const ticks = [[range.high, TOP + 8], [range.low, HEIGHT - BOTTOM]].map(([value, at]) => svg("text", { x: LEFT - 5, y: at, "text-anchor": "end" }, shown(value)));
  if (Number.isFinite(range.first)) {
    ticks.push(svg("text", { x: LEFT, y: HEIGHT - 6 }, `step ${range.first}`));
    if (range.last > range.first) ticks.push(svg("text", { x: WIDTH - RIGHT, y: HEIGHT - 6, "text-anchor": "end" }, String(range.last)));
  }
  const last = chart.lines.map((line) => `${line.label} ${shown(line.points.at(-1)[1])}`.trim()).join(", ");
  const label = `${chart.title}, ${chart.unit}, steps ${range.first} to ${range.last}; at the last step: ${last}`;
  return svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label }, axis, ...zero, ...lines, ...ends, ...ticks);
}

export function figure(chart, range = rangeOf([chart])) {
  const found = document.createElement("figure");
  found.className = "chart";
  const caption = document.createElement("figcaption");
  caption.textContent = chart.unit && chart.unit !== "1" ? `${chart.title} (${chart.unit})` : chart.title;
  const legend = document.createElement("p");
  legend.className = "legend";
  legend.setAttribute("aria-hidden", "true");   // the picture's label says the same
  chart.lines.forEach((line, i) => {
    const [entry, swatch] = [document.createElement("span"), document.createElement("i")];
    swatch.className = `swatch line-${i % COLOURS + 1}`;
    entry.append(swatch, `${line.label} ${shown(line.points.at(-1)[1])}`.trim());
    legend.append(entry);
  });
  found.append(caption, picture(chart, range), legend);
  return found;
}
