// A chart of several runs over the steps. Colours come from the page's style, so that they follow the theme.
import uPlot from "./vendor/uplot.js";
import { html, useEffect, useRef } from "./vendor/preact-htm.js";
import { short } from "./parts.js";
import { language, t } from "./words.js";

const sync = uPlot.sync("steps");
export const colour = (i) => getComputedStyle(document.documentElement).getPropertyValue(`--run-${i % 8}`).trim();
const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// series: [{ label, x, y, run (its place), kind: raw, line, points or limit }]
export function Chart({ title, series, format = short, height = 220, onRange, theme }) {
  const place = useRef(null);
  const plot = useRef(null);
  const key = series.map((each) => `${each.label}|${each.kind}|${each.run}`).join(";") + theme + title + language();
  const data = () => uPlot.join(series.map((each) => [each.x, each.y])); // null, a NaN, is a gap; a step of other runs is not

  useEffect(() => {
    if (!series.length) return undefined;
    const style = (each) => {
      const stroke = each.kind === "limit" ? ink("--muted") : colour(each.run);
      const base = { label: each.label, stroke, spanGaps: false, value: (_, v) => (v === null || v === undefined ? "–" : format(v)) };
      if (each.kind === "raw") return { ...base, stroke: `${stroke}66`, width: 1, points: { show: false } };
      if (each.kind === "points") return { ...base, width: 0, paths: () => null, points: { show: true, size: 8, fill: stroke } };
      if (each.kind === "limit") return { ...base, width: 1.5, dash: [6, 4], points: { show: false } };
      return { ...base, width: 2, points: { show: series[0].x.length < 3 } };
    };
    const axis = { stroke: ink("--muted"), grid: { stroke: ink("--line"), width: 1 }, ticks: { stroke: ink("--line"), width: 1 }, font: "12px system-ui" };
    const made = new uPlot({
      width: Math.max(place.current.clientWidth, 200), height,
      scales: { x: { time: false } },
      axes: [{ ...axis, values: (_, ticks) => ticks.map((v) => (Number.isInteger(v) ? v.toLocaleString("en") : "")) },
        { ...axis, size: 72, values: (_, ticks) => ticks.map((v) => format(v)) }],
      series: [{ label: t("step"), value: (_, v) => v ?? "–" }, ...series.map(style)],
      cursor: { sync: { key: sync.key }, drag: { x: true, y: false, setScale: false } },
      legend: { live: true },
      hooks: {
        setSelect: [(u) => {
          if (u.select.width < 4) return;
          onRange?.(Math.floor(u.posToVal(u.select.left, "x")), Math.ceil(u.posToVal(u.select.left + u.select.width, "x")));
          u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
        }],
      },
    }, data(), place.current);
    made.over.addEventListener("dblclick", () => onRange?.(null, null));
    plot.current = made;
    const sized = new ResizeObserver(() => {
      const width = place.current?.clientWidth ?? 0;
      if (width > 0 && width !== made.width) made.setSize({ width, height });
    });
    sized.observe(place.current);
    return () => { sized.disconnect(); made.destroy(); plot.current = null; };
  }, [key]);
  useEffect(() => {
    if (!plot.current || !series.length) return;
    plot.current.setData(data());
    if (plot.current.cursor.left < 0) plot.current.setLegend({ idx: plot.current.data[0].length - 1 }); // the newest step
  });

  const last = series.filter((each) => each.kind !== "raw").map((each) => `${each.label} ${format(each.y.at(-1) ?? 0)}`).join(", ");
  if (!series.length) return null;
  return html`<figure class="chart"><figcaption>${title}</figcaption><div ref=${place} role="img" aria-label=${`${title}: ${last}`}></div></figure>`;
}
