// An answer's text, whose tokens tell their probability under the pointer or with the arrow keys.
import { html, useState } from "./vendor/preact-htm.js";
import { percent } from "./parts.js";
import { t } from "./words.js";

const UNFINISHED = "\ufffd"; // a token that is a part of a character

// The text in parts, each with the tokens that wrote it. The parts together are the text, whatever the tokens are.
export function partsOf(text, tokens) {
  const parts = [];
  let at = 0, waiting = [];
  for (const token of tokens) {
    const found = token.token && !token.token.includes(UNFINISHED) ? text.indexOf(token.token, at) : -1;
    if (found < 0 || (found > at && !waiting.length)) { waiting.push(token); continue; }
    if (found > at) parts.push({ text: text.slice(at, found), tokens: waiting });
    parts.push({ text: token.token, tokens: [token] });
    at = found + token.token.length;
    waiting = [];
  }
  if (at < text.length) parts.push({ text: text.slice(at), tokens: waiting });
  return parts;
}

const shown = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
const share = (logprob) => (Math.exp(logprob) < 0.0005 ? "< 0.1 %" : percent(Math.exp(logprob)));

export function Answer({ said }) {
  const [at, setAt] = useState(null);
  if (!said.tokens?.length) return html`<p>${said.content || "…"}</p>`;
  const parts = partsOf(said.content, said.tokens), part = at === null ? null : parts[at];
  const move = (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") setAt(null);
    if (!by || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    setAt(Math.min(Math.max((at ?? (by > 0 ? -1 : parts.length)) + by, 0), parts.length - 1));
  };
  const over = (event) => { const place = event.target.dataset?.at; setAt(place === undefined ? null : Number(place)); };
  return html`<p class="answer" tabindex="0" role="group" aria-label=${t("answerTokens")} onMouseOver=${over} onClick=${over}
      onMouseLeave=${() => setAt(null)} onBlur=${() => setAt(null)} onKeyDown=${move}>
      ${parts.map((each, i) => html`<span key=${i} data-at=${i} class=${`token${i === at ? " picked" : ""}`}>${each.text}</span>`)}</p>
    ${part && html`<div class="tip" role="status">${part.tokens.map((token, i) => html`<div key=${i}>
      <strong><code>${shown(token.token)}</code> ${share(token.logprob)}</strong>
      <ol>${token.top_logprobs.map((each, j) => html`<li key=${j}><code>${shown(each.token)}</code> ${share(each.logprob)}</li>`)}</ol>
    </div>`)}${!part.tokens.length && t("none")}</div>`}`;
}
