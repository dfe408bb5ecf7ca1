// The page: navigation, theme, language, and the state that the server tells.
import { html, render, useEffect, useState } from "./vendor/preact-htm.js";
import { get, listen } from "./api.js";
import { language, setLanguage, t } from "./words.js";
import { Runs } from "./runs.js";
import { Prepare } from "./prepare.js";
import { Chat } from "./chat.js";
import { Export } from "./export.js";

const VIEWS = { runs: Runs, prepare: Prepare, chat: Chat, export: Export };
const viewed = () => (location.hash.slice(2) in VIEWS ? location.hash.slice(2) : "runs");

function setTheme(name) {
  localStorage.setItem("theme", name);
  if (name === "auto") delete document.documentElement.dataset.theme; else document.documentElement.dataset.theme = name;
}
setTheme(localStorage.getItem("theme") ?? "auto");

function App() {
  const [view, setView] = useState(viewed());
  const [state, setState] = useState(null);
  const [info, setInfo] = useState(null);
  const [isConnected, setConnected] = useState(true);
  const [, setTurn] = useState(0); // drawn again in another language or theme
  const [theme, keepTheme] = useState(localStorage.getItem("theme"));
  useEffect(() => {
    const turn = () => setView(viewed());
    addEventListener("hashchange", turn);
    get("/api/info").then(setInfo, () => setConnected(false));
    const stop = listen(setState, setConnected);
    return () => { removeEventListener("hashchange", turn); stop(); };
  }, []);
  useEffect(() => { document.title = `${t(view)} · onecard studio`; });
  return html`
    <header class="top">
      <a class="skip" href=${`#/${view}`} onClick=${() => document.getElementById("content").focus()}>${t("skip")}</a>
      <strong>onecard <span>studio</span></strong>
      <nav>${Object.keys(VIEWS).map((name) => html`<a key=${name} href=${`#/${name}`} aria-current=${name === view ? "page" : null}>${t(name)}</a>`)}</nav>
      <div class="choices">
        <select aria-label=${t("theme")} value=${theme} onChange=${(e) => { setTheme(e.target.value); keepTheme(e.target.value); }}>
          ${["auto", "light", "dark"].map((name) => html`<option key=${name} value=${name}>${t(name)}</option>`)}
        </select>
        <select aria-label=${t("language")} value=${language()} onChange=${(e) => { setLanguage(e.target.value); setTurn((n) => n + 1); }}>
          <option value="en">English</option><option value="zh">中文</option>
        </select>
      </div>
    </header>
    ${!isConnected && html`<p class="lost" role="status">${t("lost")}</p>`}
    <main id="content" tabindex="-1">
      ${Object.entries(VIEWS).map(([name, View]) => html`<section key=${name} hidden=${name !== view} class="view">
        <${View} state=${state} info=${info} isShown=${name === view} theme=${theme} lang=${language()} /></section>`)}
    </main>`;
}

render(html`<${App} />`, document.getElementById("app"));
