// Parts that the views share: errors, a picker of files, numbers as text.
import { html, useEffect, useRef, useState } from "./vendor/preact-htm.js";
import { post } from "./api.js";
import { told } from "./messages.js";
import { t } from "./words.js";

const UNITS = ["bytes", "KiB", "MiB", "GiB", "TiB"];
export function bytes(number) {
  if (number === null || number === undefined) return "–";
  let value = number, unit = 0;
  while (Math.abs(value) >= 1024 && unit < UNITS.length - 1) { value /= 1024; unit += 1; }
  return `${value >= 100 || unit === 0 ? value.toFixed(0) : value.toPrecision(3)} ${UNITS[unit]}`;
}

export function short(number) {
  if (number === null || number === undefined) return "–";
  const size = Math.abs(number);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return number.toExponential(2);
  return size >= 1000 ? Math.round(number).toLocaleString("en") : String(Number(number.toPrecision(4)));
}

export const percent = (share) => `${(100 * share).toFixed(1)} %`;
export const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

// The three parts of a mistake. A list of bad rows has a line for each: file:line:field first.
export function Fault({ error }) {
  if (!error) return null;
  const parts = error.parts ?? { must: error.message, found: "", do: "", where: null };
  const [found, ...more] = parts.found.split("\n");
  return html`<div class="fault" role="alert">
    <p>${parts.where && html`<code class="where">${parts.where}</code> `}${told(parts.must)}</p>
    <dl>
      <dt>${t("found")}</dt><dd>${told(found)}${more.length > 0 && html`<ul>${more.map((line) => html`<li><code>${line.trim()}</code></li>`)}</ul>`}</dd>
      ${parts.do && html`<dt>${t("doThis")}</dt><dd>${told(parts.do)}</dd>`}
    </dl>
  </div>`;
}

export function Field({ label, children, hint }) {
  return html`<label class="field"><span>${label}</span>${children}${hint && html`<small>${hint}</small>`}</label>`;
}

// A dialog of the machine's folders. `kind` is model, adapter, data or folder.
export function Picker({ kind, from, onPick, onClose }) {
  const [listed, setListed] = useState(null);
  const [error, setError] = useState(null);
  const dialog = useRef(null);
  const open = (folder) => post("/api/files", { folder }).then((found) => { setListed(found); setError(null); }, setError);
  useEffect(() => { dialog.current.showModal(); open(from || "."); }, []);
  const choose = (path) => { onPick(path); onClose(); };
  const join = (name) => (listed.folder.endsWith("/") ? listed.folder + name : `${listed.folder}/${name}`);
  return html`<dialog ref=${dialog} class="picker" aria-label=${t("browse")} onClose=${onClose}>
    <header><code>${listed?.folder ?? "…"}</code><button type="button" onClick=${onClose}>${t("close")}</button></header>
    <${Fault} error=${error} />
    ${listed && html`<div class="entries" tabindex="0">
      <button type="button" class="entry" onClick=${() => open(listed.parent)}>↑ ${t("up")}</button>
      ${listed.entries.map((entry) => html`<div class="entry-row" key=${entry.name}>
        ${entry.bytes === undefined
          ? html`<button type="button" class="entry" onClick=${() => open(join(entry.name))}>▸ ${entry.name}/</button>`
          : html`<span class="entry">${entry.name} <small>${bytes(entry.bytes)}</small></span>`}
        ${(entry.kind === kind || kind === "folder" || (kind === "data" && entry.bytes === undefined)) && html`
          <button type="button" class=${entry.kind === kind ? "primary" : ""} aria-label=${`${t("choose")} ${entry.name}`}
            onClick=${() => choose(join(entry.name))}>${t("choose")}</button>`}
      </div>`)}
      ${listed.is_cut && html`<p>${t("folderCut")}</p>`}
    </div>`}
    ${listed && html`<footer><button type="button" onClick=${() => choose(listed.folder)}>${t("choose")} <code>${listed.folder}</code></button></footer>`}
  </dialog>`;
}

export function Path({ label, value, kind, onChange, many = false, id }) {
  const [isOpen, setOpen] = useState(false);
  const add = (path) => onChange(many ? [...lines(value), path].join("\n") : path);
  const last = many ? lines(value).at(-1) ?? "" : value;
  return html`<div class="path">
    <${Field} label=${label}>${many
      ? html`<textarea id=${id} rows="2" spellcheck="false" value=${value} onInput=${(e) => onChange(e.target.value)}></textarea>`
      : html`<input id=${id} spellcheck="false" value=${value} onInput=${(e) => onChange(e.target.value)} />`}<//>
    <button type="button" aria-label=${`${t("browse")}: ${label}`} onClick=${() => setOpen(true)}>${t("browse")}</button>
    ${isOpen && html`<${Picker} kind=${kind} from=${last} onPick=${add} onClose=${() => setOpen(false)} />`}
  </div>`;
}

export function Copied({ text, label }) {
  const [done, setDone] = useState(false);
  const copy = () => navigator.clipboard.writeText(text).then(() => { setDone(true); setTimeout(() => setDone(false), 1500); });
  return html`<div class="copied"><header><h3>${label}</h3><button type="button" onClick=${copy}>${done ? t("copied") : t("copy")}</button></header>
    <pre tabindex="0">${text}</pre></div>`;
}

// A text that is fetched again while it may grow.
export function Log({ read, isGrowing, onClose, label }) {
  const [text, setText] = useState("");
  const end = useRef(null);
  useEffect(() => {
    const load = () => read().then((found) => setText(found.text), () => {});
    load();
    const timer = isGrowing ? setInterval(load, 1000) : null;
    return () => clearInterval(timer);
  }, [isGrowing, label]);
  useEffect(() => { end.current.scrollTop = end.current.scrollHeight; }, [text]);
  return html`<section class="card log"><header><h3>${t("log")} <small>${label}</small></h3>
    <button type="button" onClick=${onClose}>${t("close")}</button></header><pre ref=${end} tabindex="0">${text || "…"}</pre></section>`;
}
