// Requests to the server. A mistake of the user is an Error with the three parts of the server's answer.

const LIKELIEST = 5; // tokens in each place

export class Mistake extends Error {
  constructor(parts) {
    super(`${parts.must}; found: ${parts.found}`);
    this.parts = parts;
  }
}

async function answered(response) {
  const content = await response.json().catch(() => null);
  if (response.ok) return content;
  const told = content && content.must ? content : {
    must: "the server must answer", found: content?.error?.message ?? `status ${response.status}`,
    do: "look at the server's terminal", where: null,
  };
  throw new Mistake(told);
}

export async function get(path, query = {}) {
  const words = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) {
    for (const each of Array.isArray(value) ? value : [value]) if (each !== null && each !== undefined) words.append(name, each);
  }
  return answered(await fetch(`${path}?${words}`));
}

export async function post(path, content) {
  return answered(await fetch(path, {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(content),
  }));
}

// The state of all runs: told at once and at each change. A hidden page listens to nothing.
export function listen(onState, onConnection) {
  let source = null;
  const open = () => {
    source = new EventSource("/api/events");
    source.onopen = () => onConnection(true);
    source.onerror = () => onConnection(false); // the browser tries again by itself
    source.onmessage = (event) => onState(JSON.parse(event.data));
  };
  const follow = () => {
    if (document.hidden) { source?.close(); source = null; } else if (!source) open();
  };
  document.addEventListener("visibilitychange", follow);
  follow();
  return () => { document.removeEventListener("visibilitychange", follow); source?.close(); };
}

// Pieces of a chat's answer, as they come: a text, and its tokens with their log-probabilities.
export async function* streamed(body, signal) {
  const response = await fetch("/chat/v1/chat/completions", {
    method: "POST", headers: { "content-type": "application/json" }, signal,
    body: JSON.stringify({ ...body, stream: true, logprobs: true, top_logprobs: LIKELIEST }),
  });
  if (!response.ok) await answered(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Mistake({ must: "the model must answer", found: chunk.error.message, do: "try again", where: null });
      const choice = chunk.choices[0], text = choice?.delta?.content ?? "", tokens = choice?.logprobs?.content ?? [];
      if (text || tokens.length) yield { text, tokens };
    }
  }
}
