// Draws a run's curves and tables. All text goes in as text, never as markup. What follows in the page
// draws the step, if there is one.
"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const run = read("run-data");
  const place = document.getElementById("curves"), tables = document.getElementById("tables");

  function element(parent, tag, text = "") {
    const made = document.createElement(tag);
    made.textContent = text;
    parent.append(made);
    return made;
  }

  function draw(curve, box) {
    const traces = curve.series.map((series, index) => ({
      name: series.name, x: series.x, y: series.y,
      mode: series.x.length > 50 ? "lines" : "lines+markers",
      opacity: curve.series.length > 1 && index === 0 ? 0.35 : 1,
    }));
    const layout = {
      title: { text: curve.title, x: 0.02, font: { size: 14 } }, height: 320, margin: { l: 70, r: 20, t: 50, b: 40 },
      xaxis: { title: { text: "step" } }, yaxis: { exponentformat: "e" },
      showlegend: traces.length > 1, legend: { orientation: "h", y: 1.08, x: 1, xanchor: "right" },
    };
    return Plotly.newPlot(box, traces, layout, { responsive: true, displayModeBar: false });
  }

  document.getElementById("run").textContent = run.summary;
  for (const table of run.tables) {
    if (!table.rows.length) continue;
    const box = element(tables, "div");
    element(box, "h2", table.title);
    const body = element(box, "table");
    for (const [name, value] of table.rows) {
      const row = element(body, "tr");
      element(row, "td", name).className = "muted";
      element(row, "td", value);
    }
  }
  document.getElementById("step").hidden = read("data") === null;
  // All boxes are there before the first plot takes its size from one.
  const boxes = run.curves.map(() => element(place, "div"));
  Promise.all(run.curves.map((curve, index) => draw(curve, boxes[index]))).then(() => (document.body.dataset.curves = "drawn"));
})();
