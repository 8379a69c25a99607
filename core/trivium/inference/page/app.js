// The web chat. A conversation is a tree of turns with a head, kept by the server (/v1/sessions) with the exact tokens;
// where a server keeps none, the same tree lives in this page and whole histories are sent.
import { call, streamed } from "./api.js";
import { element, markdown } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const SETTINGS = ["temperature", "top_p", "max_tokens", "seed"];
const FOLLOW = 80; // pixels from the end within which new text scrolls into view

const state = {
  keeps: true, // whether the server keeps conversations
  session: null, // its id; null before the first question
  model: "", // hash of the model that the server has, as its sessions say
  foreign: false, // whether the conversation was held with another
  turns: new Map(), // id -> {id, parent, role, text, data}
  head: null,
  running: null, // {controller, answers}
  thumbs: new Map(),
};

// ---- the tree

const children = (id) => [...state.turns.values()].filter((turn) => turn.parent === id);

function path(id) {
  const found = [];
  for (let turn = state.turns.get(id); turn; turn = state.turns.get(turn.parent)) found.unshift(turn);
  return found;
}

function deepest(id) {
  for (let next = children(id); next.length; next = children(id)) id = next.at(-1).id;
  return id;
}

// ---- settings

function settings() {
  const told = {};
  for (const name of SETTINGS) if ($(name).value !== "") told[name] = Number($(name).value);
  return told;
}

function remember() {
  const told = Object.fromEntries([...SETTINGS, "n", "system"].map((name) => [name, $(name).value]));
  try {
    localStorage.setItem("settings", JSON.stringify(told));
  } catch {} // private windows keep nothing
}

function recall() {
  try {
    for (const [name, value] of Object.entries(JSON.parse(localStorage.getItem("settings") ?? "{}"))) {
      if ($(name)) $(name).value = value;
    }
  } catch {}
}

// ---- what is shown

function say(text, alert = false) {
  $("status").textContent = text;
  $("status").classList.toggle("alert", alert);
}

function follow() {
  const log = $("log");
  return log.scrollHeight - log.scrollTop - log.clientHeight < FOLLOW;
}

function button(text, does, more = {}) {
  return element("button", { type: "button", onclick: does, ...more }, text);
}

function siblings(turn) {
  const beside = children(turn.parent).filter((other) => other.role === turn.role);
  if (beside.length < 2) return [];
  const at = beside.indexOf(turn);
  const step = (by) => () => go(deepest(beside[at + by].id));
  return [
    button("‹", step(-1), { "aria-label": "Earlier version", disabled: at === 0 }),
    element("span", { class: "count" }, `${at + 1} of ${beside.length}`),
    button("›", step(1), { "aria-label": "Later version", disabled: at === beside.length - 1 }),
  ];
}

function rate(turn) {
  const { tokens, rate: known, seconds, finish_reason: reason } = turn.data ?? {};
  if (!tokens) return "";
  const speed = known ?? (seconds > 0 ? tokens / seconds : null);
  return `${tokens} tokens${speed ? `, ${speed.toFixed(1)} tokens/s` : ""}${reason === "length" ? ", cut at the longest answer" : ""}`;
}

function thumb(turn, value, text, label) {
  const pressed = state.thumbs.get(turn.id) === value;
  return button(text, () => judge(turn, pressed ? "none" : value), { "aria-label": label, "aria-pressed": String(pressed) });
}

function bubble(turn, tools = true) {
  const own = turn.role === "user";
  const body = element("div", { class: "text" });
  if (own) body.textContent = turn.text;
  else body.append(markdown(turn.text));
  if (!own && !turn.text.trim()) body.append(element("em", {}, "(nothing)"));
  const made = element("article", { class: turn.role, "aria-label": own ? "You" : "Answer" }, body);
  if (!tools) return made;
  const busy = state.running !== null;
  const row = element("div", { class: "tools" });
  if (own) row.append(...siblings(turn), button("Edit", () => edit(turn, made), { disabled: busy }));
  else {
    row.append(
      ...siblings(turn),
      thumb(turn, "up", "Good", "Good answer"),
      thumb(turn, "down", "Bad", "Bad answer"),
      button("Again", () => again(turn), { disabled: busy, "aria-label": "Answer again" }),
      button("Copy", () => navigator.clipboard?.writeText(turn.text)),
      element("span", { class: "rate" }, rate(turn)),
    );
  }
  made.append(row);
  return made;
}

function compared(turns) {
  const columns = turns.map((turn, i) => {
    const made = bubble(turn, false);
    made.setAttribute("aria-label", `Answer ${i + 1}`);
    made.append(element("div", { class: "tools" },
      button("This one is better", () => prefer(turn, turns), { class: "prefer", "aria-label": `Answer ${i + 1} is better` }),
      element("span", { class: "rate" }, rate(turn))));
    return made;
  });
  return element("div", { class: "compared" }, ...columns);
}

function show() {
  const log = $("log");
  const stay = follow();
  const shown = path(state.head).filter((turn) => turn.role === "user" || turn.role === "assistant" || turn.data?.left);
  log.replaceChildren(...shown.map((turn) => {
    if (turn.role === "context") {
      const told = turn.text ? `The model reads this in place of what came before: ${turn.text}` : "The model no longer reads what came before";
      return element("p", { class: "note" }, told);
    }
    if (turn.id === state.head && state.comparing) return compared(state.comparing.map((id) => state.turns.get(id)));
    return bubble(turn);
  }));
  if (!shown.length) log.append(element("p", { class: "note" }, "Nothing was said yet."));
  if (state.foreign) {
    log.append(element("p", { class: "note" }, "This conversation was held with another model. ", button("Go on in a copy", copy)));
  }
  if (stay) log.scrollTop = log.scrollHeight;
}

function running(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
  $("log").setAttribute("aria-busy", String(on)); // read out when it is whole, not token by token
}

// ---- conversations

async function list() {
  if (!state.keeps) return;
  const { data } = await call("GET", "/v1/sessions");
  $("sessions").replaceChildren(...data.map((session) => {
    const here = session.id === state.session;
    const title = session.title || "untitled";
    return element("li", {},
      button(title, () => open(session.id), { class: "session", "aria-current": here ? "true" : null }),
      button("×", () => remove(session.id, title), { class: "remove", "aria-label": `Delete ${title}` }));
  }));
}

function take(session) {
  state.session = session.id;
  state.turns = new Map(session.turns.map((turn) => [turn.id, turn]));
  state.head = session.head;
  state.foreign = session.foreign;
  state.comparing = null;
  $("title").textContent = session.title || "New conversation";
}

async function refresh(id = state.session) {
  const known = new Map([...state.turns].map(([key, turn]) => [key, turn.data?.rate]));
  take(await call("GET", `/v1/sessions/${encodeURIComponent(id)}`));
  for (const turn of state.turns.values()) if (known.get(turn.id)) turn.data.rate = known.get(turn.id);
}

async function open(id) {
  await attempt(async () => {
    stop();
    await refresh(id);
    location.hash = id;
    menu(false);
    show();
    await list();
    $("log").scrollTop = $("log").scrollHeight;
    $("question").focus();
  });
}

function fresh() {
  stop();
  Object.assign(state, { session: null, turns: new Map(), head: null, foreign: false, comparing: null });
  history.replaceState(null, "", location.pathname);
  $("title").textContent = "New conversation";
  menu(false);
  say("");
  show();
  attempt(list);
  $("question").focus();
}

async function remove(id, title) {
  if (!confirm(`Delete “${title}” for good?`)) return;
  await attempt(async () => {
    await call("DELETE", `/v1/sessions/${encodeURIComponent(id)}`);
    if (id === state.session) fresh();
    else await list();
  });
}

async function go(id) {
  state.head = id;
  state.comparing = null;
  show();
  if (state.session && !state.foreign) await attempt(() => call("POST", `/v1/sessions/${encodeURIComponent(state.session)}`, { head: id }));
}

async function copy() {
  await attempt(async () => {
    const made = await call("POST", `/v1/sessions/${encodeURIComponent(state.session)}/copy`, {});
    await open(made.id);
  });
}

// ---- asking

async function attempt(does) {
  try {
    return await does();
  } catch (error) {
    say(error.message, true);
    return undefined;
  }
}

function stop() {
  state.running?.controller.abort();
}

async function send(text, parent) {
  if (state.running || !text.trim()) return;
  const before = state.head;
  const n = Number($("n").value);
  const controller = new AbortController();
  const mine = { controller };
  state.running = mine;
  state.comparing = null;
  say("");
  const asked = { id: "asked", parent, role: "user", text };
  const answers = Array.from({ length: n }, (_, i) => ({ id: `answer-${i}`, parent: "asked", role: "assistant", text: "", data: {} }));
  state.head = parent;
  show();
  const log = $("log");
  log.querySelector(".note:only-child")?.remove();
  const drawn = answers.map((turn) => bubble(turn, false));
  log.append(bubble(asked, false), n > 1 ? element("div", { class: "compared" }, ...drawn) : drawn[0]);
  log.scrollTop = log.scrollHeight;
  running(true);
  try {
    if (state.keeps && !state.session) {
      const made = await call("POST", "/v1/sessions", { system: $("system").value.trim() });
      if (state.running === mine) state.session = made.id;
    }
    await stream(asked, answers, drawn, controller, n);
    await keep(asked, answers, n);
  } catch (error) {
    const stopped = error.name === "AbortError";
    state.head = before;
    if (state.running === mine && !$("question").value) $("question").value = text;
    say(stopped ? "Stopped; nothing of it is kept." : error.message, !stopped);
  } finally {
    if (state.running === mine) {
      state.running = null;
      running(false);
      show();
      grow();
      $("question").focus();
    }
    attempt(list);
  }
}

async function stream(asked, answers, drawn, controller, n) {
  const body = { model: $("model").value, stream: true, stream_options: { include_usage: true }, ...settings() };
  if (n > 1) {
    body.n = n;
    if (!("temperature" in body)) body.temperature = 0.8; // two greedy answers are one
  }
  const system = $("system").value.trim();
  const said = path(asked.parent).map(({ role, text }) => ({ role, content: text }));
  const history = [...(system ? [{ role: "system", content: system }] : []), ...said];
  body.messages = [...(state.session ? [] : history), { role: "user", content: asked.text }];
  if (state.session) Object.assign(body, { session: state.session, parent: asked.parent ?? "" });
  let first = 0, last = 0, usage = null, due = false;
  const draw = () => {
    due = false;
    const stay = follow();
    answers.forEach((turn, i) => drawn[i].firstChild.replaceChildren(markdown(turn.text)));
    if (stay) $("log").scrollTop = $("log").scrollHeight;
  };
  for await (const chunk of streamed("/v1/chat/completions", body, controller.signal)) {
    usage = chunk.usage ?? usage;
    for (const choice of chunk.choices) {
      const turn = answers[choice.index];
      turn.id = choice.index ? `${chunk.id}-${choice.index}` : chunk.id;
      if (choice.delta?.content) {
        last = performance.now();
        first ||= last;
        turn.text += choice.delta.content;
      }
      if (choice.finish_reason) turn.data.finish_reason = choice.finish_reason;
    }
    if (!due) {
      due = true;
      requestAnimationFrame(draw);
    }
  }
  draw();
  if (usage) {
    const tokens = usage.completion_tokens;
    const speed = last > first ? ((tokens - n) / (last - first)) * 1000 : null;
    say(`${tokens} tokens${speed ? `, ${speed.toFixed(1)} tokens/s` : ""}, ${usage.prompt_tokens} read${cached(usage)}`);
    for (const turn of answers) Object.assign(turn.data, n > 1 ? {} : { tokens, rate: speed });
  }
}

function cached(usage) {
  const found = usage.prompt_tokens_details?.cached_tokens;
  return found ? `, of which ${found} were cached` : "";
}

async function keep(asked, answers, n) {
  for (const turn of answers) state.turns.set(turn.id, turn);
  if (state.session) {
    await refresh();
  } else {
    const same = children(asked.parent).find((turn) => turn.role === "user" && turn.text === asked.text);
    const question = same ?? { ...asked, id: crypto.randomUUID() };
    state.turns.set(question.id, question);
    for (const turn of answers) turn.parent = question.id;
    state.head = answers[0].id;
  }
  state.comparing = n > 1 && answers.every((turn) => state.turns.has(turn.id)) ? answers.map((turn) => turn.id) : null;
}

function again(turn) {
  const question = state.turns.get(turn.parent);
  if (Number($("temperature").value) === 0 && $("n").value === "1" && !$("temperature").value) {
    say("Without a temperature an answer may come out the same.");
  }
  send(question.text, question.parent);
}

function edit(turn, made) {
  const box = element("textarea", { "aria-label": "Edit the question", rows: "3" });
  box.value = turn.text;
  const cancel = () => show();
  const done = () => {
    if (box.value.trim() && box.value !== turn.text) send(box.value, turn.parent);
    else cancel();
  };
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      done();
    } else if (event.key === "Escape") {
      event.stopPropagation();
      cancel();
    }
  });
  made.replaceChildren(box, element("div", { class: "tools" }, button("Ask this", done), button("Cancel", cancel)));
  box.focus();
}

// ---- what people say of answers

async function judge(turn, value) {
  await attempt(async () => {
    await call("POST", "/v1/feedback", { id: turn.id, kind: "thumb", value });
    state.thumbs.set(turn.id, value);
    say(value === "none" ? "Taken back." : "Thank you, it is kept.");
    show();
  });
}

async function prefer(turn, turns) {
  const ranked = [turn.id, ...turns.filter((other) => other !== turn).map((other) => other.id)];
  await go(turn.id);
  await attempt(async () => {
    await call("POST", "/v1/feedback", { id: turn.id, kind: "preference", value: ranked });
    say("Thank you, it is kept.");
  });
  $("question").focus();
}

// ---- the page

function menu(on) {
  document.body.classList.toggle("menu", on);
  $("menu").setAttribute("aria-expanded", String(on));
}

function grow() {
  const box = $("question");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight + 2, innerHeight / 3)}px`;
}

function submit() {
  const text = $("question").value;
  if (!text.trim() || state.running) return;
  if (state.foreign) {
    say("This conversation was held with another model; go on in a copy of it.", true);
    return;
  }
  $("question").value = "";
  grow();
  send(text, state.head);
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
$("question").addEventListener("input", grow);
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (state.running) stop();
  else menu(false);
});
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", fresh);
$("menu").addEventListener("click", () => menu(!document.body.classList.contains("menu")));
$("tune").addEventListener("click", () => {
  $("settings").hidden = !$("settings").hidden;
  $("tune").setAttribute("aria-expanded", String(!$("settings").hidden));
});
$("settings").addEventListener("change", remember);
$("settings").addEventListener("submit", (event) => event.preventDefault());

recall();
show();
grow();
await attempt(async () => {
  const models = (await call("GET", "/v1/models")).data;
  $("model").replaceChildren(...models.map(({ id }) => element("option", { value: id }, id)));
});
try {
  await list();
} catch (error) {
  state.keeps = false;
  document.body.classList.add("keeps-none");
  if (error.status !== 404) say(error.message, true);
}
if (state.keeps && location.hash.length > 1) await open(decodeURIComponent(location.hash.slice(1)));
document.body.dataset.ready = "true";
