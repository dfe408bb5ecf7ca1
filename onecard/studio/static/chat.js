// Base and adapters side by side on the same message, streaming.
import { html, useRef, useState } from "./vendor/preact-htm.js";
import { Answer } from "./answer.js";
import { post, streamed } from "./api.js";
import { Fault, Field, Path, lines } from "./parts.js";
import { t } from "./words.js";

const BEFORE = { temperature: "0", top_p: "", max_tokens: "256", seed: "", system: "" };

export function Chat({ state }) {
  const chat = state?.chat ?? { state: "empty", models: [] };
  const tuned = (state?.runs ?? []).filter((run) => run.has_adapter && run.model);
  const [run, setRun] = useState("");
  const [model, setModel] = useState("");
  const [adapters, setAdapters] = useState("");
  const [error, setError] = useState(null);
  const [left, setLeft] = useState([]); // models that do not answer
  const [how, setHow] = useState(BEFORE);
  const [message, setMessage] = useState("");
  const [talks, setTalks] = useState({}); // messages by model
  const [isBusy, setBusy] = useState(false);
  const stop = useRef(null), base = useRef(null);
  const set = (name) => (e) => setHow((before) => ({ ...before, [name]: e.target.value }));

  if (base.current !== `${chat.base}|${chat.models.join("|")}` && chat.state === "ready") {
    base.current = `${chat.base}|${chat.models.join("|")}`;
    if (Object.keys(talks).length) setTalks({});
  }
  const pick = (name) => {
    setRun(name);
    const found = tuned.find((each) => each.name === name);
    if (found) { setModel(found.model_path); setAdapters(found.adapter_path); }
  };
  const load = () => { setError(null); post("/api/load", { model: model.trim(), adapters: lines(adapters) }).catch(setError); };
  const answering = chat.models.filter((name) => !left.includes(name));

  const send = async () => {
    if (!message.trim() || isBusy) return;
    const asked = { role: "user", content: message };
    stop.current = new AbortController();
    setBusy(true); setError(null); setMessage("");
    const begun = Object.fromEntries(answering.map((name) => [name, [...(talks[name] ?? []), asked]]));
    setTalks((before) => ({ ...before, ...Object.fromEntries(answering.map((name) => [name, [...begun[name], { role: "assistant", content: "", tokens: [] }]])) }));
    const one = async (name) => {
      const messages = [...(how.system ? [{ role: "system", content: how.system }] : []), ...begun[name].map(({ role, content }) => ({ role, content }))];
      const body = { model: name, messages, temperature: Number(how.temperature), max_tokens: Number(how.max_tokens) || 256 };
      if (how.top_p) body.top_p = Number(how.top_p);
      if (how.seed) body.seed = Number(how.seed);
      for await (const { text, tokens } of streamed(body, stop.current.signal)) {
        setTalks((before) => {
          const said = before[name] ?? [], last = said.at(-1);
          return last ? { ...before, [name]: [...said.slice(0, -1), { ...last, content: last.content + text, tokens: [...last.tokens, ...tokens] }] } : before;
        });
      }
    };
    const ended = await Promise.allSettled(answering.map(one));
    const failed = ended.find((each) => each.status === "rejected" && each.reason.name !== "AbortError");
    if (failed) setError(failed.reason);
    setBusy(false);
  };
  // The message goes back into the box; it and all after it leave each talk.
  const edit = (at) => {
    const name = answering.find((each) => talks[each]?.[at]?.role === "user");
    setMessage(talks[name][at].content);
    setTalks((before) => Object.fromEntries(Object.entries(before).map(([each, said]) => [each, said.slice(0, at)])));
  };
  const save = () => {
    const rows = Object.values(talks).filter((said) => said.length > 1 && said.every((each) => each.content))
      .map((said) => JSON.stringify({ messages: [...(how.system ? [{ role: "system", content: how.system }] : []), ...said.map(({ role, content }) => ({ role, content }))] }));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(rows.map((row) => `${row}\n`), { type: "application/jsonl" }));
    link.download = "talk.jsonl";
    link.click();
    URL.revokeObjectURL(link.href);
  };
  const hasTalk = Object.values(talks).some((said) => said.length > 1);
  return html`
    <h1>${t("chat")}</h1>
    <div class="card">
      <div class="grid folders">
        <${Field} label=${t("tunedRun")}><select id="tuned" value=${run} onChange=${(e) => pick(e.target.value)}><option value="">${t("own")}</option>
          ${tuned.map((each) => html`<option key=${each.name} value=${each.name}>${each.name}</option>`)}</select><//>
        <${Path} id="chat-model" label=${t("model")} kind="model" value=${model} onChange=${setModel} />
        <${Path} id="chat-adapters" label=${t("adapters")} kind="adapter" many value=${adapters} onChange=${setAdapters} />
      </div>
      <p class="go"><button type="button" class="primary" disabled=${!model || chat.state === "loading"} onClick=${load}>${t("load")}</button>
        <span role="status">${chat.state === "loading" ? t("loading") : chat.state === "ready" ? `${t("loaded")}: ${chat.models.join(", ")}` : chat.state === "failed" ? "" : t("noModel")}</span></p>
      <${Fault} error=${error} />
    </div>
    ${chat.state === "ready" && html`
      <details class="card"><summary>${t("sampling")}</summary><div class="grid">
        <${Field} label=${t("temperature")}><input type="number" min="0" max="2" step="0.1" value=${how.temperature} onInput=${set("temperature")} /><//>
        <${Field} label=${t("topP")}><input type="number" min="0" max="1" step="0.05" value=${how.top_p} onInput=${set("top_p")} /><//>
        <${Field} label=${t("maxTokens")}><input type="number" min="1" value=${how.max_tokens} onInput=${set("max_tokens")} /><//>
        <${Field} label=${t("seed")}><input type="number" value=${how.seed} onInput=${set("seed")} /><//>
        <${Field} label=${t("system")}><textarea rows="2" value=${how.system} onInput=${set("system")}></textarea><//>
      </div></details>
      <fieldset class="ask"><legend>${t("ask")}</legend>${chat.models.map((name) => html`<label key=${name}><input type="checkbox" checked=${!left.includes(name)}
        onChange=${(e) => setLeft(e.target.checked ? left.filter((each) => each !== name) : [...left, name])} /> ${name}</label>`)}</fieldset>
      <div class="talks" aria-live="polite" aria-busy=${isBusy}>${answering.map((name) => html`<section class="card talk" key=${name}><h2>${name}</h2>
        ${(talks[name] ?? []).map((said, at) => html`<div key=${at} class=${`said ${said.role}`}>
          ${said.role === "user" && html`<header><small>${t("you")}</small> <button type="button" disabled=${isBusy} onClick=${() => edit(at)}>${t("edit")}</button></header>`}
          ${said.role === "user" ? html`<p>${said.content}</p>` : html`<${Answer} said=${said} />`}</div>`)}</section>`)}</div>
      ${hasTalk && html`<p class="note">${t("tokensHint")}</p>`}
      <form class="card send" onSubmit=${(e) => { e.preventDefault(); send(); }}>
        <${Field} label=${t("prompt")}><textarea id="message" rows="3" value=${message} onInput=${(e) => setMessage(e.target.value)}
          onKeyDown=${(e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) { e.preventDefault(); send(); } }}></textarea><//>
        <p class="go">${isBusy ? html`<button type="button" onClick=${() => stop.current.abort()}>${t("stop")}</button>`
          : html`<button type="submit" class="primary" disabled=${!answering.length}>${t("send")}</button>`}
          <button type="button" disabled=${isBusy || !hasTalk} onClick=${() => setTalks({})}>${t("clear")}</button>
          <button type="button" disabled=${isBusy || !hasTalk} onClick=${save}>${t("saveTalk")}</button></p>
      </form>`}`;
}
