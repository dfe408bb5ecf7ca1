// Prepare a run: model and data, the tokens it learns, its memory plan, its command; start it.
import { html, useEffect, useRef, useState } from "./vendor/preact-htm.js";
import { post } from "./api.js";
import { told, toldParts } from "./messages.js";
import { Copied, Fault, Field, Path, bytes, lines, percent, short } from "./parts.js";
import { t } from "./words.js";

const RANKS = [1, 2, 4, 8, 16, 32, 64, 128, 256];
const OPTIMIZERS = ["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "lion", "muon", "sgd", "adafactor", "schedule_free_adamw"];
const BEFORE = {
  model: "", data: "", eval_data: "", output: "run", r: 16, max_seq_length: 1024, per_device_train_batch_size: 1, gradient_accumulation_steps: 8,
  recompute: "", budget: 0, device: "", optim: "adamw", learning_rate: "", num_train_epochs: "", max_steps: "", more: "",
};
const GIB = 2 ** 30;

// The settings of `onecard train` that the form gives. What is not given has train's own default.
function fieldsOf(form) {
  const data = lines(form.data), fields = {};
  if (form.model) fields.model = form.model.trim();
  if (data.length) fields.data = data.length === 1 ? data[0] : data;
  if (form.eval_data.trim()) fields.eval_data = form.eval_data.trim();
  fields.output = form.output.trim() || "run";
  for (const name of ["r", "max_seq_length", "per_device_train_batch_size", "gradient_accumulation_steps"]) fields[name] = Number(form[name]);
  for (const name of ["learning_rate", "num_train_epochs", "max_steps"]) if (String(form[name]).trim()) fields[name] = Number(form[name]);
  if (form.optim !== "adamw") fields.optim = form.optim;
  if (form.recompute) fields.gradient_checkpointing = form.recompute === "true";
  if (form.budget > 0) fields.weights_budget = `${Math.round(form.budget * 1024)}MiB`;
  if (form.device) fields.device_memory = `${Math.round(form.device * 1024)}MiB`;
  return fields;
}

// Answers to changing questions: one request at a time, and the newest question next.
function useAnswer(ask, key, isAsked) {
  const [answer, setAnswer] = useState({ value: null, error: null, milliseconds: 0 });
  const busy = useRef(false), next = useRef(null);
  const go = async (question) => {
    if (busy.current) { next.current = question; return; }
    busy.current = true;
    const begun = performance.now();
    try {
      const value = await question();
      setAnswer({ value, error: null, milliseconds: performance.now() - begun });
    } catch (error) { setAnswer((before) => ({ ...before, error })); }
    busy.current = false;
    if (next.current) { const waiting = next.current; next.current = null; go(waiting); }
  };
  useEffect(() => { if (isAsked) go(ask); }, [key, isAsked]);
  return answer;
}

export function Prepare({ info, isShown }) {
  const [form, setForm] = useState(() => ({ ...BEFORE, ...JSON.parse(localStorage.getItem("form") ?? "{}") }));
  const set = (name) => (value) => setForm((before) => ({ ...before, [name]: value?.target ? value.target.value : value }));
  useEffect(() => { localStorage.setItem("form", JSON.stringify(form)); }, [form]);
  const fields = fieldsOf(form), sent = { fields, more: form.more }, key = JSON.stringify(sent);
  const memory = form.device || (info ? (0.8 * info.free_bytes) / GIB : 0);
  const limit = memory ? `${Math.round(memory * 1024)}MiB` : "";
  const isAsked = isShown && Boolean(form.model) && info !== null;
  const plan = useAnswer(() => post("/api/plan", { ...sent, device_memory: limit }), key + limit, isAsked);
  const written = useAnswer(() => post("/api/command", sent), key, isShown);
  const [idle, setIdle] = useState("");
  useEffect(() => { const timer = setTimeout(() => setIdle(key + limit), 700); return () => clearTimeout(timer); }, [key, limit]);
  const searched = useAnswer(() => post("/api/plan", { ...sent, device_memory: limit, searches: true }), idle, isAsked && idle === key + limit && Boolean(limit));
  const [preview, setPreview] = useState({ key: null, value: null, error: null, isBusy: false });
  const [error, setError] = useState(null);
  const look = () => {
    setPreview((before) => ({ ...before, isBusy: true }));
    post("/api/preview", sent).then((value) => setPreview({ key, value, error: null, isBusy: false }), (mistake) => setPreview({ key, value: null, error: mistake, isBusy: false }));
  };
  const start = () => post("/api/train", sent).then(() => { setError(null); location.hash = "#/runs"; }, setError);
  const longest = Math.min(plan.value?.longest_context ?? 8192, 131072);
  const slider = (name, label, low, high, step, shown) => html`<div class="slider"><${Field} label=${label}>
    <input type="range" min=${low} max=${high} step=${step} value=${form[name]} aria-valuetext=${shown ?? null} onInput=${set(name)} /><//>
    <input type="number" min=${low} max=${high} step=${step} aria-label=${label} value=${form[name]} onInput=${set(name)} /></div>`;
  return html`
    <h1>${t("prepare")}</h1>
    <div class="prepare">
      <form class="card" onSubmit=${(e) => { e.preventDefault(); start(); }}>
        <h2>${t("inputs")}</h2>
        <${Path} id="model" label=${t("model")} kind="model" value=${form.model} onChange=${set("model")} />
        <${Path} id="data" label=${t("data")} kind="data" many value=${form.data} onChange=${set("data")} />
        <${Path} id="eval_data" label=${t("evalData")} kind="data" value=${form.eval_data} onChange=${set("eval_data")} />
        <${Path} id="output" label=${t("output")} kind="folder" value=${form.output} onChange=${set("output")} />
        <h2>${t("training")}</h2>
        <div class="slider"><${Field} label=${t("r")}><input type="range" min="0" max=${RANKS.length - 1} step="1" aria-valuetext=${`${form.r}`}
          value=${Math.max(RANKS.findLastIndex((r) => r <= form.r), 0)} onInput=${(e) => set("r")(RANKS[e.target.value])} /><//>
          <input type="number" min="1" aria-label=${t("r")} value=${form.r} onInput=${set("r")} /></div>
        ${slider("max_seq_length", t("length"), 64, longest, 64)}
        ${slider("per_device_train_batch_size", t("batch"), 1, 64, 1)}
        ${slider("budget", t("paging"), 0, 64, 0.25)}
        <div class="grid">
          <${Field} label=${t("recompute")}><select value=${form.recompute} onChange=${set("recompute")}>
            <option value="">${t("planDecides")}</option><option value="true">${t("yes")}</option><option value="false">${t("no")}</option></select><//>
          <${Field} label=${t("device")}><input type="number" min="0" step="any" placeholder=${memory ? memory.toFixed(1) : ""} value=${form.device} onInput=${set("device")} /><//>
          <${Field} label=${t("accumulation")}><input type="number" min="1" value=${form.gradient_accumulation_steps} onInput=${set("gradient_accumulation_steps")} /><//>
          <${Field} label=${t("optimizer")}><select value=${form.optim} onChange=${set("optim")}>${OPTIMIZERS.map((name) => html`<option key=${name} value=${name}>${name}</option>`)}</select><//>
          <${Field} label=${t("rate")}><input inputmode="decimal" placeholder=${defaultOf(info, "learning_rate")} value=${form.learning_rate} onInput=${set("learning_rate")} /><//>
          <${Field} label=${t("epochs")}><input inputmode="decimal" placeholder=${defaultOf(info, "num_train_epochs")} value=${form.num_train_epochs} onInput=${set("num_train_epochs")} /><//>
          <${Field} label=${t("maxSteps")}><input type="number" min="1" value=${form.max_steps} onInput=${set("max_steps")} /><//>
        </div>
        <details open=${form.more !== ""}><summary>${t("more")}</summary>
          <textarea rows="5" spellcheck="false" aria-label=${t("more")} placeholder="lora_alpha: 32" value=${form.more} onInput=${set("more")}></textarea>
          <dl class="known">${info?.settings.map((each) => html`<dt key=${each.name}><code>${each.name}: ${JSON.stringify(each.default)}</code></dt><dd>${each.description}</dd>`)}</dl></details>
        <${Fault} error=${error} />
        <p class="go"><button type="submit" class="primary">${t("start")}</button></p>
      </form>
      <div class="beside">
        <${Plan} plan=${plan} searched=${searched.value} isCurrent=${idle === key + limit} limit=${memory * GIB} />
        <section class="card"><header><h2>${t("dataTitle")}</h2><button type="button" id="look" disabled=${preview.isBusy || !form.model || !form.data} onClick=${look}>${t("preview")}</button></header>
          <div aria-live="polite">${preview.isBusy && html`<p class="note">${t("previewing")}</p>`}</div>
          <${Fault} error=${preview.error} />
          ${preview.value && html`<${Preview} found=${preview.value} />`}</section>
        <section class="card"><${Fault} error=${written.error} />
          ${written.value && html`${written.value.command ? html`<${Copied} label=${t("command")} text=${written.value.command} />` : html`<p>${t("onlyYaml")}</p>`}
          <${Copied} label=${t("yaml")} text=${written.value.yaml} />`}</section>
      </div>
    </div>`;
}

const defaultOf = (info, name) => String(info?.settings.find((each) => each.name === name)?.default ?? "");

function Plan({ plan, searched, isCurrent, limit }) {
  const found = plan.value;
  if (!found) return html`<section class="card"><h2>${t("plan")}</h2><${Fault} error=${plan.error} /></section>`;
  // A run that takes little of the card has its terms enlarged, under a gauge of the whole card.
  const isSmall = found.total_bytes < 0.25 * limit, whole = isSmall ? found.total_bytes : Math.max(found.total_bytes, limit);
  const width = (size) => `${(100 * size) / whole}%`;
  return html`<section class=${`card plan ${found.fits === false ? "over" : ""}`}><header><h2>${t("plan")}</h2>
      <small>${t("planIn")} <span id="plan-time">${Math.round(plan.milliseconds)}</span> ms</small></header>
    <${Fault} error=${plan.error} />
    <p class="verdict" aria-live="polite"><strong>${bytes(found.total_bytes)}</strong> ${t("of")} ${bytes(limit)}: ${found.fits ? t("fits") : t("doesNotFit")}</p>
    <div class="bar" role="img" aria-label=${found.terms.map((term) => `${told(term.name)} ${bytes(term.num_bytes)}`).join(", ")}>
      ${found.terms.map((term, i) => html`<i key=${term.name} class=${`term-${i % 12}`} style=${{ width: width(term.num_bytes) }} title=${`${told(term.name)}: ${bytes(term.num_bytes)}`}></i>`)}
      ${limit > 0 && !isSmall && html`<b style=${{ left: width(limit) }}></b>`}</div>
    ${isSmall && html`<div class="bar gauge" aria-hidden="true"><i class="term-0" style=${{ width: `${(100 * found.total_bytes) / limit}%` }}></i></div>`}
    <p>${toldParts(found.choice)}</p>
    <div class="scroll" tabindex="0"><table class="terms"><tbody>${found.terms.map((term, i) => html`<tr key=${term.name}><th scope="row"><i class=${`chip term-${i % 12}`}></i> ${told(term.name)}</th><td>${bytes(term.num_bytes)}</td><td class="formula"><small>${term.formula}</small></td></tr>`)}</tbody></table></div>
    ${isCurrent && searched?.largest_length !== undefined && searched?.largest_length !== null && html`<p>${t("largest")}: ${searched.largest_length.toLocaleString("en")} ${t("tokens")}, ${searched.largest_batch.toLocaleString("en")} ${t("rows")}</p>`}
    ${isCurrent && searched?.changes.length > 0 && html`<p>${t("change")}:</p><ul>${searched.changes.map((each) => html`<li key=${each.setting}><code>${each.setting}</code> (${short(each.time)} ${t("times")})</li>`)}</ul>`}
    <p class="note">${t("assumed")}</p></section>`;
}

function Preview({ found }) {
  const counts = { ...found.counts, [t("supervised")]: percent(found.share_supervised), [t("truncated")]: percent(found.share_truncated), [t("packed")]: `${found.rows.toLocaleString("en")}, ${percent(found.share_filled)} ${t("full")}` };
  return html`
    <dl class="counts">${Object.entries(counts).map(([name, value]) => html`<div key=${name}><dt>${told(name)}</dt><dd>${typeof value === "number" ? value.toLocaleString("en") : value}</dd></div>`)}</dl>
    ${found.sources.length > 0 && html`<div class="scroll" tabindex="0"><table><thead><tr>${Object.keys(found.sources[0]).map((name) => html`<th key=${name}>${name}</th>`)}</tr></thead>
      <tbody>${found.sources.map((row) => html`<tr key=${row.source}>${Object.entries(row).map(([name, cell]) => html`<td key=${name}>${cell}</td>`)}</tr>`)}</tbody></table></div>`}
    ${found.notices.map((notice) => html`<p class="note" key=${notice}>${notice}</p>`)}
    ${found.num_bad > 0 && html`<div class="fault"><p>${t("badRows")}: ${found.num_bad.toLocaleString("en")}</p><ul>${found.bad.map((error) => html`<li key=${error.where}><code>${error.where}</code> ${error.must}; ${t("found")}: ${error.found}</li>`)}</ul></div>`}
    <p class="legend"><mark>${t("learned")}</mark> <span class="masked">${t("masked")}</span></p>
    ${found.examples.map((example) => example.parts.map((part) => html`<figure class="example" key=${example.where + part.name}>
      <figcaption><code>${example.where}</code> ${part.name}</figcaption>
      <p class="tokens" tabindex="0" role="group" aria-label=${example.where}>${part.tokens.map(([text, learned], i) => html`<${Token} key=${i} text=${text} learned=${learned} />`)}
      ${part.count > part.tokens.length && html`<em> … ${part.count - part.tokens.length} ${t("tokensMore")}</em>`}</p></figure>`))}`;
}

function Token({ text, learned }) {
  const shown = text.replaceAll("\n", "↵\n").replaceAll("\t", "→\t");
  return learned ? html`<mark>${shown}</mark>` : html`<span class="masked">${shown}</span>`;
}
