"use strict";
(function () {
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const AXIS = 62; // pixels left of a concatenated chart's plot: labels and title

  // The charts use the page's colours, so that only the style sheet defines the light and dark themes.
  function look(width) {
    const style = getComputedStyle(document.documentElement);
    const css = (name) => style.getPropertyValue(name).trim();
    const ink = css("--ink"), muted = css("--muted"), line = css("--line"), font = css("--sans");
    const series = css("--series").split(/\s+/);
    const text = { labelFont: font, titleFont: font, labelColor: muted, titleColor: muted };
    return {
      background: "transparent",
      font: font,
      padding: { left: 0, right: 8, top: 4, bottom: 6 },
      range: { category: series },
      mark: { color: series[0] },
      rule: { color: series[0] },
      text: { color: ink, font: font },
      view: { stroke: null },
      axis: Object.assign({
        titleFontWeight: "normal", labelFontSize: 12, titleFontSize: 12, titlePadding: 8,
        gridColor: line, domainColor: line, tickColor: line,
      }, text),
      legend: Object.assign({
        orient: "top", labelFontSize: 12, titleFontWeight: "normal", titleFontSize: 12,
        columns: width < 420 ? 2 : 4, labelLimit: 140, symbolStrokeWidth: 2,
      }, text),
    };
  }

  // Width "container" works for single charts only: stacked charts each need an explicit width.
  function fitted(spec, width) {
    if (!spec.vconcat) return spec;
    const copy = Object.assign({}, spec);
    copy.vconcat = spec.vconcat.map((part) =>
      Object.assign({}, part, { width: Math.max(120, Math.min(width - AXIS - 12, 460)) }));
    return copy;
  }

  const drawn = new Map();

  async function draw(place) {
    const width = Math.floor(place.clientWidth);
    const before = drawn.get(place);
    drawn.set(place, { width: width, result: null });
    if (before && before.result) before.result.finalize();
    const { spec } = specs[place.dataset.plot];
    const result = await window.vegaEmbed(place, fitted(spec, width), {
      mode: "vega-lite", actions: false, renderer: "svg", config: look(width), ast: true,
      tooltip: { theme: "page", offsetX: 14, offsetY: 14 },
    });
    drawn.get(place).result = result;
    place.dataset.drawn = "yes";
  }

  function all(wanted) {
    document.querySelectorAll(".plot").forEach((place) => {
      if (wanted(place)) draw(place).catch((error) => {
        place.textContent = "This chart could not be drawn: " + error.message;
        console.error(error);
      });
    });
  }

  let waiting;
  window.addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => all((p) => Math.floor(p.clientWidth) !== drawn.get(p).width), 150);
  });
  dark.addEventListener("change", () => all(() => true));
  all(() => true);
})();
