(function () {
  "use strict";
  var figures = JSON.parse(document.getElementById("figure-data").textContent);
  var root = document.documentElement;
  var DASHES = ["solid", "dash", "dot", "dashdot"];
  var config = { displayModeBar: false, displaylogo: false, responsive: true, scrollZoom: false, plotlyServerURL: "" };

  // Colours live in the style sheet only; the figures are painted with what it says now.
  function palette() {
    var style = getComputedStyle(root);
    var one = function (name) { return style.getPropertyValue("--" + name).trim(); };
    var many = function (name) { return one(name).split(",").map(function (c) { return c.trim(); }); };
    return { ink: one("ink"), soft: one("soft"), line: one("line"), grid: one("grid"), paper: one("paper"), sheet: one("sheet"),
      heat: many("heat"), lines: many("lines"), rings: [one("ring-a"), one("ring-b")], free: one("free"), font: one("sans") };
  }

  function lineStyle(slot, colours) {
    return { color: colours.lines[slot % colours.lines.length], dash: DASHES[Math.floor(slot / colours.lines.length) % DASHES.length] };
  }

  function channels(hex) { return [1, 3, 5].map(function (i) { return parseInt(hex.slice(i, i + 2), 16); }); }

  // The colour of a cell, as plotly mixes it between two steps of the scale.
  function shade(fraction, scale) {
    var place = fraction * (scale.length - 1);
    var step = Math.min(Math.floor(place), scale.length - 2);
    var low = channels(scale[step]), high = channels(scale[step + 1]);
    return low.map(function (c, i) { return c + (high[i] - c) * (place - step); });
  }

  // Black or white, whichever has the higher contrast ratio (WCAG) on the colour.
  function legible(rgb) {
    var linear = rgb.map(function (c) { c /= 255; return c <= 0.03928 ? c / 12.92 : Math.pow((c + 0.055) / 1.055, 2.4); });
    var luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
    return (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) ? "#12100d" : "#ffffff";
  }

  function paintTrace(trace, colours) {
    var role = trace.meta && trace.meta.role;
    if (role === "heat") {
      trace.colorscale = colours.heat.map(function (c, i) { return [i / (colours.heat.length - 1), c]; });
      trace.colorbar.tickfont = { color: colours.soft, size: 12 };
    } else if (role === "number") {
      trace.textfont = { size: 12, color: trace.customdata.map(function (v) { return v === null ? colours.soft : legible(shade(v, colours.heat)); }) };
    } else if (role === "line") {
      trace.line = Object.assign({ width: 2.2 }, lineStyle(trace.meta.slot, colours));
      trace.marker.color = trace.line.color;
      trace.marker.line = { width: 2, color: trace.line.color };
      ["error_x", "error_y"].forEach(function (name) { if (trace[name]) { trace[name].color = trace.line.color; } });
    } else if (role === "frontier") {
      trace.line = Object.assign({ color: colours.soft, width: 1.6 }, trace.line);
    } else if (role === "ring") {
      var ring = colours.rings[trace.meta.slot % 2];
      trace.marker = { color: ring, line: { width: 1, color: colours.paper } };
      trace.textfont = { color: legible(channels(ring)) };
    } else if (role === "free") {
      trace.marker = { color: colours.free, line: { width: 1, color: colours.line } };
      trace.textfont = { color: colours.soft };
    }
    return trace;
  }

  function paint(figure, colours) {
    var copy = JSON.parse(JSON.stringify(figure));
    copy.data.forEach(function (trace) { paintTrace(trace, colours); });
    var layout = copy.layout;
    layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
    layout.font = { family: colours.font, size: 13, color: colours.ink };
    layout.hoverlabel = { bgcolor: colours.sheet, bordercolor: colours.line, font: { color: colours.ink, family: colours.font } };
    ["xaxis", "yaxis"].forEach(function (name) {
      Object.assign(layout[name], { gridcolor: colours.grid, zerolinecolor: colours.grid, linecolor: colours.line, fixedrange: true });
      if (layout[name].title) { layout[name].title.font = { color: colours.soft, size: 13 }; }
    });
    (layout.shapes || []).forEach(function (shape) { shape.line.color = colours.ink; });
    layout.autosize = true;
    return copy;
  }

  function legend(list, colours) {
    list.querySelectorAll("button").forEach(function (button) {
      var style = lineStyle(Number(button.dataset.slot), colours);
      var mark = button.querySelector("svg");
      mark.style.color = style.color;
      mark.querySelector("line").setAttribute("stroke-dasharray", { solid: "none", dash: "6 3", dot: "2 3", dashdot: "6 2 2 2" }[style.dash]);
    });
  }

  function draw(width) {
    var colours = palette();
    Object.keys(figures).forEach(function (id) {
      var place = document.getElementById(id);
      var painted = paint(figures[id], colours);
      if (width) { painted.layout.width = width; painted.layout.autosize = false; }
      Plotly.react(place, painted.data, painted.layout, config);
    });
    document.querySelectorAll(".legend").forEach(function (list) { legend(list, colours); });
  }

  document.querySelectorAll(".legend").forEach(function (list) {
    list.addEventListener("click", function (event) {
      var button = event.target.closest("button");
      if (!button) { return; }
      var shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(shown));
      var traces = figures[list.dataset.for].data, places = [];
      traces.forEach(function (trace, i) {
        if (trace.meta.slot === Number(button.dataset.slot)) { trace.visible = shown; places.push(i); }
      });
      Plotly.restyle(list.dataset.for, { visible: shown }, places);
    });
  });

  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", function () { draw(); });
  window.addEventListener("beforeprint", function () { root.classList.add("printing"); draw(660); });
  window.addEventListener("afterprint", function () { root.classList.remove("printing"); draw(); });
})();
