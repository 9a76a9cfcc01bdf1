// Draws a step's timeline, memory and graph with Plotly. All text goes in as text, never as markup.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const tasks = data.tasks;
const byName = new Map(tasks.map((task, index) => [task.name, index]));
const critical = new Set(data.critical);
const config = { responsive: true, displaylogo: false, scrollZoom: true,
  modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]] };
let selected = -1;

const seconds = (s) => (s >= 1 ? s.toFixed(3) + " s" : (s * 1e3).toFixed(3) + " ms");
const bytes = (n) => {
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]])
    if (n >= size) return (n / size).toFixed(2) + " " + unit;
  return n + " B";
};

function add(parent, tag, text = "", attributes = {}) {
  const element = document.createElement(tag);
  element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element[name] = value;
  parent.append(element);
  return element;
}

// -- timeline: rows are lanes; of bars narrower than a pixel only one in each pixel is drawn -------

const rows = [];
for (const world of data.worlds)
  for (const lane of data.lanes) rows.push({ world, lane, label: lane + (data.worlds.length > 1 ? " " + world.name : "") });

function bars(start, stop) {
  const pixel = (stop - start) / 1600;
  const trace = { type: "bar", orientation: "h", x: [], base: [], y: [], customdata: [], text: [],
    hovertemplate: "%{text}<extra></extra>", textposition: "none",
    marker: { color: [], line: { color: [], width: [] } }, showlegend: false };
  for (const row of rows) {
    let reached = -Infinity;
    for (const [index, begin, end] of row.world.spans[row.lane] || []) {
      if (end < start || begin > stop) continue;
      if (index !== selected && end - begin < pixel && begin < reached + pixel) continue;
      reached = end;
      const task = tasks[index], lit = critical.has(index) && row.world === data.worlds[0];
      trace.x.push(end - begin);
      trace.base.push(begin);
      trace.y.push(row.label);
      trace.customdata.push(index);
      trace.text.push(task.name + "  " + seconds(end - begin));
      trace.marker.color.push(index === selected ? "#111" : data.colours[task.lane]);
      trace.marker.line.color.push("#d4a017");
      trace.marker.line.width.push(lit && end - begin > 6 * pixel ? 1 : 0);
    }
  }
  return trace;
}

const whole = [data.start, data.stop];
let range = whole;
function drawTimeline() {
  const layout = {
    title: { text: "timeline (outlined: critical path)" }, height: 120 + 44 * rows.length,
    margin: { l: 130, r: 20, t: 40, b: 40 }, bargap: 0.15, barmode: "overlay", dragmode: "pan",
    xaxis: { range, title: { text: "seconds" } },
    yaxis: { type: "category", categoryarray: rows.map((r) => r.label).reverse(), fixedrange: true,
             range: [-0.5, rows.length - 0.5] },
  };
  return Plotly.react("timeline", [bars(...range)], layout, config);
}

function follow(event) {
  const low = event["xaxis.range[0]"] ?? event["xaxis.range"]?.[0];
  const high = event["xaxis.range[1]"] ?? event["xaxis.range"]?.[1];
  const next = low !== undefined ? [low, high] : event["xaxis.autorange"] ? whole : range;
  if (next[0] === range[0] && next[1] === range[1]) return;
  range = next;
  drawTimeline();
  Plotly.relayout("memory", { "xaxis.range": range });
}

// -- memory ---------------------------------------------------------------------------------------

function drawMemory() {
  const traces = [];
  for (const tier of data.memory) {
    const line = { shape: "hv", color: { gpu: "#4c78a8", pinned: "#f58518", cpu: "#54a24b" }[tier.name] };
    traces.push({ name: tier.name, x: tier.times, y: tier.bytes, mode: "lines", line,
      text: tier.bytes.map(bytes), hovertemplate: "%{text}" });
    for (const [label, value] of tier.limits)
      traces.push({ name: tier.name + " " + label, x: whole, y: [value, value],
        mode: "lines", line: { color: line.color, dash: label === "budget" ? "dash" : "dot" },
        text: [bytes(value), bytes(value)], hovertemplate: "%{text}" });
  }
  const layout = { title: { text: "memory with contents" }, height: 300, dragmode: "pan",
    margin: { l: 130, r: 20, t: 40, b: 40 }, xaxis: { range, title: { text: "seconds" } },
    yaxis: { title: { text: "bytes" }, rangemode: "tozero", exponentformat: "SI", fixedrange: true },
    legend: { orientation: "h", y: -0.25 } };
  return Plotly.newPlot("memory", traces, layout, config);
}

// -- graph: columns are generations, rows lanes ---------------------------------------------------

function segments(pairs) {
  const x = [], y = [];
  for (const [from, to] of pairs) {
    x.push(tasks[from].x, tasks[to].x, null);
    y.push(tasks[from].y, tasks[to].y, null);
  }
  return { x, y };
}

function drawGraph() {
  const type = tasks.length > 3000 ? "scattergl" : "scatter";
  const lines = (pairs, color, width, name) => ({ type, mode: "lines", ...segments(pairs), name,
    line: { color, width }, hoverinfo: "skip" });
  const pairs = tasks.flatMap((task, to) => task.waits.map((from) => [from, to]));
  const path = data.critical.slice(1).map((to, i) => [data.critical[i], to]);
  const own = selected < 0 ? [] : pairs.filter((pair) => pair.includes(selected));
  const nodes = { type, mode: "markers", x: tasks.map((t) => t.x), y: tasks.map((t) => t.y),
    customdata: tasks.map((_, i) => i), text: tasks.map((t) => t.name), name: "tasks",
    hovertemplate: "%{text}<extra></extra>",
    marker: { color: tasks.map((t, i) => (i === selected ? "#111" : data.colours[t.lane])),
              size: tasks.map((_, i) => (i === selected ? 14 : 7)) } };
  const layout = { title: { text: "graph (left to right: what waits for what)" }, height: 520,
    margin: { l: 130, r: 20, t: 40, b: 40 }, dragmode: "pan", hovermode: "closest", uirevision: 1,
    xaxis: { title: { text: "generation" } },
    yaxis: { tickvals: data.lanes.map((_, i) => i), ticktext: data.lanes, zeroline: false,
             autorange: "reversed" }, legend: { orientation: "h", y: -0.12 } };
  return Plotly.react("graph", [lines(pairs, "rgba(120,120,120,.25)", 1, "edges"),
    lines(path, "#d4a017", 3, "critical path"), lines(own, "#111", 2, "selected"), nodes], layout, config);
}

// -- details --------------------------------------------------------------------------------------

function taskList(parent, title, indices) {
  add(parent, "h2", `${title} (${indices.length})`);
  const list = add(parent, "ul");
  for (const index of indices) {
    const [, stop] = tasks[index].span;
    const item = add(list, "li");
    add(item, "a", tasks[index].name, { onclick: () => select(index) });
    add(item, "span", "  until " + seconds(stop), { className: "muted" });
  }
}

function bufferList(parent, title, names) {
  add(parent, "h2", `${title} (${names.length})`);
  const list = add(parent, "ul");
  for (const name of names) {
    const [nbytes, tier, slot] = data.buffers[name];
    add(list, "li", `${name}  ${bytes(nbytes)}, ${tier}${slot ? ", slot " + slot : ""}`);
  }
}

function select(index) {
  selected = index;
  const task = tasks[index], box = document.getElementById("details");
  box.replaceChildren();
  const [start, stop] = task.span;
  add(box, "h1", task.name);
  add(box, "p", `${task.kind} on ${task.lane}, op ${task.op}`);
  add(box, "p", `${seconds(start)} to ${seconds(stop)}: ${seconds(stop - start)}`);
  if (task.blocker >= 0) {
    const why = add(box, "p", "started when this was done: ");
    add(why, "a", tasks[task.blocker].name, { onclick: () => select(task.blocker) });
  }
  if (critical.has(index)) add(box, "p", "on the critical path");
  taskList(box, "waits for", task.waits);
  taskList(box, "is waited for by", task.followers);
  bufferList(box, "reads", task.reads);
  bufferList(box, "writes", task.writes);
  history.replaceState(null, "", "#" + encodeURIComponent(task.name));
  drawTimeline();
  drawGraph();
}

function find(text) {
  const exact = byName.get(text);
  if (exact !== undefined) return exact;
  return text ? tasks.findIndex((task) => task.name.includes(text)) : -1;
}

function drawDifferences() {
  if (!data.differences.length) return;
  const box = document.getElementById("differences");
  add(box, "h2", "largest differences, measured against predicted");
  const table = add(box, "table"), head = add(table, "tr");
  for (const title of ["task", "predicted", "measured"]) add(head, "th", title);
  for (const [index, predicted, measured] of data.differences) {
    const row = add(table, "tr");
    add(add(row, "td"), "a", tasks[index].name, { onclick: () => select(index) });
    add(row, "td", seconds(predicted), { className: "number" });
    add(row, "td", seconds(measured), { className: "number" });
  }
}

for (const task of tasks) task.followers = [];
tasks.forEach((task, index) => task.waits.forEach((from) => tasks[from].followers.push(index)));
document.getElementById("summary").textContent = data.summary;
document.getElementById("names").append(...tasks.map((task) => new Option(task.name)));
const search = document.getElementById("search");
search.addEventListener("change", () => {
  const index = find(search.value.trim());
  if (index >= 0) select(index);
  else document.getElementById("details").textContent = "no task has this in its name";
});
const pick = (event) => {
  const index = event.points[0].customdata;
  if (index !== undefined) select(index);
};
Promise.all([drawTimeline(), drawMemory(), drawGraph()]).then(() => {
  const timeline = document.getElementById("timeline");
  timeline.on("plotly_click", pick);
  timeline.on("plotly_relayout", follow);
  document.getElementById("memory").on("plotly_relayout", follow);
  document.getElementById("graph").on("plotly_click", pick);
  drawDifferences();
  const wanted = find(decodeURIComponent(location.hash.slice(1)));
  if (wanted >= 0) select(wanted);
  document.body.dataset.ready = "yes";
});
