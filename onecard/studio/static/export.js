// Merge and export: the commands of the command line, with what they have written so far and what they print.
import { html, useState } from "./vendor/preact-htm.js";
import { get, post } from "./api.js";
import { Fault, Field, Log, Path, bytes, lines } from "./parts.js";
import { t } from "./words.js";

const OUTTYPES = ["bf16", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "iq4_nl", "q3_k_m"];
const FORMATS = ["merge", "gguf", "gptq", "awq", "w4a16", "fp8", "nvfp4", "mlx"];
const WITH_DATA = ["gptq", "awq", "w4a16"];
const BEFORE = { format: "merge", model: "", adapter: "", output: "", data: "", outtype: "bf16" };

function fieldsOf(form) {
  const fields = { format: form.format, model: form.model.trim(), adapter: form.adapter.trim(), output: form.output.trim() };
  const data = lines(form.data);
  if (form.format === "merge" && data.length) fields.verify = data;
  if (WITH_DATA.includes(form.format) && data.length) fields.data = data.length === 1 ? data[0] : data;
  if (form.format === "gguf") fields.outtype = form.outtype;
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== ""));
}

export function Export({ state }) {
  const [form, setForm] = useState(BEFORE);
  const [error, setError] = useState(null);
  const [shown, setShown] = useState(null);
  const tuned = (state?.runs ?? []).filter((run) => run.has_adapter && run.model);
  const set = (name) => (value) => setForm((before) => ({ ...before, [name]: value?.target ? value.target.value : value }));
  const pick = (name) => {
    const run = tuned.find((each) => each.name === name);
    if (run) setForm((before) => ({ ...before, model: run.model_path, adapter: run.adapter_path, output: before.output || `${run.name.replaceAll("/", "-")}-${before.format}` }));
  };
  const start = () => post("/api/write", { fields: fieldsOf(form) }).then((found) => { setError(null); setShown(found.job); }, setError);
  const jobs = state?.jobs ?? [];
  const job = jobs.find((each) => each.name === shown);
  return html`
    <h1>${t("export")}</h1>
    <form class="card" onSubmit=${(e) => { e.preventDefault(); start(); }}>
      <div class="grid folders">
        <${Field} label=${t("target")}><select value=${form.format} onChange=${set("format")}>${FORMATS.map((name) => html`<option key=${name} value=${name}>${t(name)}</option>`)}</select><//>
        <${Field} label=${t("tunedRun")}><select id="export-tuned" onChange=${(e) => pick(e.target.value)}><option value="">${t("own")}</option>${tuned.map((each) => html`<option key=${each.name} value=${each.name}>${each.name}</option>`)}</select><//>
        <${Path} label=${t("model")} kind="model" value=${form.model} onChange=${set("model")} />
        <${Path} label=${t("adapter")} kind="adapter" value=${form.adapter} onChange=${set("adapter")} />
        <${Path} id="export-output" label=${t("output")} kind="folder" value=${form.output} onChange=${set("output")} />
        ${form.format === "gguf" && html`<${Field} label=${t("outtype")}><select value=${form.outtype} onChange=${set("outtype")}>${OUTTYPES.map((name) => html`<option key=${name} value=${name}>${name}</option>`)}</select><//>`}
        ${["merge", ...WITH_DATA].includes(form.format) && html`<${Path} label=${t(form.format === "merge" ? "verify" : "calibrate")} kind="data" many value=${form.data} onChange=${set("data")} />`}
      </div>
      <${Fault} error=${error} />
      <p class="go"><button type="submit" class="primary" disabled=${!form.model || !form.output}>${t("write")}</button></p>
    </form>
    ${jobs.length > 0 && html`<section class="card"><h2>${t("exports")}</h2><div class="scroll" tabindex="0"><table class="runs"><thead><tr><th>${t("output")}</th><th>${t("state")}</th><th>${t("written")}</th><th>${t("actions")}</th></tr></thead>
      <tbody>${jobs.map((each) => html`<tr key=${each.name} class=${`state-${each.state}`}><td data-label=${t("output")}><strong>${each.output}</strong><small><code>${each.line}</code></small></td>
        <td data-label=${t("state")}><span class="state">${t(each.state)}</span></td><td data-label=${t("written")}>${bytes(each.written_bytes)}</td>
        <td data-label=${t("actions")}><button type="button" aria-label=${`${t("log")} ${each.output}`} onClick=${() => setShown(each.name)}>${t("log")}</button></td></tr>`)}</tbody></table></div></section>`}
    ${job && html`<${Log} key=${job.name} label=${job.output} read=${() => get("/api/log", { job: job.name })} isGrowing=${job.state === "running"} onClose=${() => setShown(null)} />`}`;
}
