// All runs under the root: their state, their curves, what differs, stop and resume.
import { html, useEffect, useRef, useState } from "./vendor/preact-htm.js";
import { get, post } from "./api.js";
import { Chart } from "./chart.js";
import { told, toldParts } from "./messages.js";
import { Fault, Log, bytes, percent, short } from "./parts.js";
import { t } from "./words.js";

const MOST_RUNS = 8, POINTS = 1200;
const BELOW = ["learning_rate", "grad_norm", "supervised_tokens_per_second", "memory_bytes", "page_hit_rate"];
const FORMATS = { memory_bytes: bytes, page_hit_rate: percent };
const LIVE = new Set(["running", "starting", "stopping"]);

// The curves of the selected runs, fetched again at most once a second when a run has new rows.
function useCurves(selected, runs, range, isShown) {
  const [curves, setCurves] = useState({});
  const [error, setError] = useState(null);
  const asked = useRef(""), timer = useRef(null), begun = useRef(0);
  const there = selected.filter((name) => runs.some((run) => run.name === name && run.version > 0));
  const wanted = JSON.stringify([there, there.map((name) => runs.find((run) => run.name === name).version), range]);
  useEffect(() => {
    if (!isShown || wanted === asked.current) return;
    clearTimeout(timer.current);
    const wait = asked.current === "" ? 0 : Math.max(0, 1000 - (Date.now() - begun.current));
    timer.current = setTimeout(() => {
      asked.current = wanted; begun.current = Date.now();
      if (!there.length) return setCurves({});
      get("/api/curves", { run: there, first: range[0], last: range[1], points: POINTS })
        .then((found) => { setCurves(found); setError(null); }, setError);
    }, JSON.parse(asked.current || "[[]]")[0].join() === there.join() ? wait : 0);
  }, [wanted, isShown]);
  return [curves, error];
}

export function Runs({ state, info, isShown, theme }) {
  const runs = state?.runs ?? [];
  const [chosen, setChosen] = useState(null); // null: the newest run, until one is chosen
  const [range, setRange] = useState([null, null]);
  const [hasRaw, setRaw] = useState(true);
  const [error, setError] = useState(null);
  const [log, setLog] = useState(null);
  const selected = (chosen ?? runs.slice(0, 1).map((run) => run.name)).filter((name) => runs.some((run) => run.name === name));
  const [curves, failed] = useCurves(selected, runs, range, isShown);
  const [differences, setDifferences] = useState(null);
  const recorded = selected.filter((name) => runs.find((run) => run.name === name)?.num_steps);
  useEffect(() => {
    if (recorded.length < 2) return setDifferences(null);
    get("/api/compare", { run: recorded }).then(setDifferences, setError);
  }, [recorded.join("\n")]);

  const toggle = (name) => setChosen(selected.includes(name) ? selected.filter((each) => each !== name) : [...selected, name].slice(-MOST_RUNS));
  const act = (path, run) => post(path, { run }).then(() => setError(null), setError);
  if (state && !runs.length) {
    return html`<div class="empty"><p>${t("noRuns")} <code>${info?.root}</code></p><a class="button primary" href="#/prepare">${t("startOne")}</a></div>`;
  }
  const place = (name) => selected.indexOf(name);
  const shownLog = log && runs.find((run) => run.name === log);
  return html`
    <h1>${t("runs")} <small>${info?.root}</small></h1>
    ${state?.is_cut && html`<p class="note">${t("isCut")}</p>`}
    <${Fault} error=${error ?? failed} />
    <div class="scroll" tabindex="0"><table class="runs"><thead><tr>
      <th>${t("show")}</th><th>${t("run")}</th><th>${t("state")}</th><th>${t("step")}</th><th>${t("loss")}</th><th>${t("speed")}</th><th>${t("memory")}</th><th>${t("actions")}</th>
    </tr></thead><tbody>
      ${runs.map((run) => html`<${Row} key=${run.name} run=${run} place=${place(run.name)} onToggle=${() => toggle(run.name)}
        onStop=${() => act("/api/stop", run.name)} onResume=${() => act("/api/resume", run.name)} onLog=${() => setLog(run.name)} />`)}
    </tbody></table></div>
    ${shownLog?.job && html`<${Log} label=${log} read=${() => get("/api/log", { job: shownLog.job })} isGrowing=${LIVE.has(shownLog.state)} onClose=${() => setLog(null)} />`}
    ${selected.length === 0 ? html`<p class="note">${t("selectOne")}</p>` : html`
      <div class="tools">
        <span>${t("steps")}</span>
        <label>${t("first")} <input type="number" min="0" value=${range[0] ?? ""} onChange=${(e) => setRange([e.target.value || null, range[1]])} /></label>
        <label>${t("last")} <input type="number" min="0" value=${range[1] ?? ""} onChange=${(e) => setRange([range[0], e.target.value || null])} /></label>
        <button type="button" onClick=${() => setRange([null, null])}>${t("all")}</button>
        <label><input type="checkbox" checked=${hasRaw} onChange=${(e) => setRaw(e.target.checked)} /> ${t("rawShown")}</label>
      </div>
      <${Charts} curves=${curves} selected=${selected} runs=${runs} hasRaw=${hasRaw} theme=${theme} onRange=${(a, b) => setRange([a, b])} />
      ${differences && html`<section class="card"><h2>${t("differences")}</h2>${differences.length === 0 ? t("noDifference") : html`
        <div class="scroll" tabindex="0"><table class="differences"><thead><tr><th>${t("setting")}</th>${recorded.map((name) => html`<th key=${name}><i class=${`chip run-${place(name)}`}></i> ${name}</th>`)}</tr></thead>
        <tbody>${differences.map((row) => html`<tr key=${row.name}><th scope="row"><code>${row.name}</code></th>${recorded.map((name) => html`<td key=${name}>${asText(row.values[name])}</td>`)}</tr>`)}</tbody></table></div>`}</section>`}
      ${recorded.length === 1 && html`<${Facts} name=${recorded[0]} key=${recorded[0]} />`}`}`;
}

const asText = (value) => (typeof value === "string" ? value : JSON.stringify(value));

function Row({ run, place, onToggle, onStop, onResume, onLog }) {
  const share = run.num_steps ? run.step / run.num_steps : 0;
  const beside = run.last.memory_bytes && run.process_bytes !== null ? Math.max(run.last.memory_bytes - run.process_bytes, 0) : null;
  return html`<tr class=${`state-${run.state}`}>
    <td data-label=${t("show")}><span><input type="checkbox" aria-label=${`${t("show")} ${run.name}`} checked=${place >= 0} onChange=${onToggle} /> <i class=${`chip run-${place}`}></i></span></td>
    <td data-label=${t("run")}><strong>${run.name}</strong>${run.model && html` <small>${run.model}</small>`}${run.message && html`<small class="bad">${run.message}</small>`}</td>
    <td data-label=${t("state")}><span class="state">${t(run.state)}</span></td>
    <td data-label=${t("step")}>${run.step.toLocaleString("en")}${run.num_steps ? html` / ${run.num_steps.toLocaleString("en")}<progress max="1" value=${share} aria-label=${`${run.name} ${percent(share)}`}></progress>` : ""}</td>
    <td data-label=${t("loss")}>${short(run.last.loss)}</td>
    <td data-label=${t("speed")}>${short(run.last.supervised_tokens_per_second)}</td>
    <td data-label=${t("memory")}>${bytes(beside)}${run.planned_bytes ? html` <small>${t("of")} ${bytes(run.planned_bytes)}</small>` : ""}</td>
    <td data-label=${t("actions")} class="actions">
      ${["running", "starting"].includes(run.state) && html`<button type="button" aria-label=${`${t("stop")} ${run.name}`} onClick=${onStop}>${t("stop")}</button>`}
      ${run.can_resume && html`<button type="button" aria-label=${`${t("resume")} ${run.name}`} onClick=${onResume}>${t("resume")}</button>`}
      ${run.has_report && html`<a class="button" target="_blank" rel="noopener" aria-label=${`${t("report")} ${run.name}`} href=${`/api/report?run=${encodeURIComponent(run.name)}`}>${t("report")}</a>`}
      ${run.job && html`<button type="button" aria-label=${`${t("log")} ${run.name}`} onClick=${onLog}>${t("log")}</button>`}
    </td></tr>`;
}

function Charts({ curves, selected, runs, hasRaw, theme, onRange }) {
  const lines = (key, kind = "line") => selected.flatMap((name, i) => (curves[name]?.[key]?.x.length ? [{ label: name, run: i, kind, ...curves[name][key] }] : []));
  const label = (word, list) => list.map((each) => ({ ...each, label: selected.length > 1 ? `${each.label} · ${word}` : word }));
  const loss = [...(hasRaw ? label(t("raw"), lines("loss", "raw")) : []), ...label(t("smoothed"), lines("smoothed"))];
  const scores = new Set(selected.flatMap((name) => Object.keys(curves[name] ?? {}).filter((key) => /^eval_(.*_)?loss$/.test(key))));
  for (const key of scores) loss.push(...label(`${t("validation")} ${key.replace(/^eval_?|_?loss$/g, "")}`.trim(), lines(key, "points")));
  const memory = selected.flatMap((name, i) => {
    const run = runs.find((each) => each.name === name), found = curves[name]?.memory_bytes;
    if (!found?.x.length || run.process_bytes === null) return [];
    const measured = { label: name, run: i, kind: "line", x: found.x, y: found.y.map((v) => (v === null ? null : Math.max(v - run.process_bytes, 0))) };
    return [measured, { label: `${selected.length > 1 ? `${name} · ` : ""}${t("planned")}`, run: i, kind: "limit", x: [found.x[0], found.x.at(-1)], y: [run.planned_bytes, run.planned_bytes] }];
  });
  return html`<div class="charts">
    <div class="wide"><${Chart} title=${t("lossTitle")} series=${loss} height=${300} theme=${theme} onRange=${onRange} /></div>
    ${BELOW.map((key) => html`<${Chart} key=${key} title=${t(key)} series=${key === "memory_bytes" ? memory : lines(key)} format=${FORMATS[key] ?? short} theme=${theme} onRange=${onRange} />`)}
  </div>`;
}

function Facts({ name }) {
  const [facts, setFacts] = useState(null);
  useEffect(() => { get("/api/run", { run: name }).then(setFacts, () => setFacts(null)); }, [name]);
  if (!facts) return null;
  return html`<section class="card facts"><h2>${name}</h2><p><code>${facts.path}</code></p>
    <details><summary>${t("plan")}: ${toldParts(facts.choice)}</summary><div class="scroll" tabindex="0"><table><tbody>
      ${facts.plan.map(([term, size, formula]) => html`<tr key=${term}><th scope="row">${told(term)}</th><td>${bytes(size)}</td><td><small>${formula}</small></td></tr>`)}</tbody></table></div></details>
    <details><summary>${t("settings")}</summary><pre tabindex="0">${JSON.stringify(facts.config, null, 1)}</pre></details>
    <details><summary>${t("command")}</summary><pre tabindex="0">${facts.command.join(" ")}</pre></details></section>`;
}
