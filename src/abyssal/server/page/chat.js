// The page: messages, the form below them, settings.

import { about, chunks, Fault, markdown } from "./conversation.js";
import { Inspector } from "./inspector.js";

const byId = (id) => document.getElementById(id);
const RENDER_PAUSE_MS = 150; // between two renderings of an answer that grows
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const STORED = [...NUMBERS, "system"];

// the one place where HTML enters the page; the server has cleaned it
const policy = globalThis.trustedTypes?.createPolicy("abyssal-markdown", { createHTML: (html) => html });
const trusted = (html) => (policy ? policy.createHTML(html) : html);

const inspector = new Inspector();
const messages = [];
let model = "";
let running = null; // of the answer that grows, its AbortController

// Settings

function loadSettings() {
  const stored = JSON.parse(localStorage.getItem("abyssal") ?? "{}");
  for (const name of STORED) byId(name).value = stored[name] ?? "";
  byId("inspect").checked = stored.inspect ?? true;
  byId("key").value = sessionStorage.getItem("abyssal-key") ?? "";
}

function saveSettings() {
  const stored = Object.fromEntries(STORED.map((name) => [name, byId(name).value]));
  localStorage.setItem("abyssal", JSON.stringify({ ...stored, inspect: byId("inspect").checked }));
  sessionStorage.setItem("abyssal-key", key());
}

const key = () => byId("key").value.trim();

function requestBody() {
  const system = byId("system").value.trim();
  const history = messages
    .filter((message) => !message.error && (message.role === "user" || message.text))
    .map(({ role, text }) => ({ role, content: text }));
  const body = { model, messages: system ? [{ role: "system", content: system }, ...history] : history };
  for (const name of NUMBERS) {
    if (byId(name).value !== "") body[name] = Number(byId(name).value);
  }
  if (byId("inspect").checked) body.abyssal = { inspect: true };
  return body;
}

async function meet() {
  try {
    const found = await about(key());
    model = found.model;
    byId("model").textContent = byId("welcome-model").textContent = model;
    document.title = `${model} – Abyssal`;
    byId("temperature").placeholder = found.defaults.temperature;
    byId("top_p").placeholder = found.defaults.top_p;
    inspector.describe(found);
    say(found.chats ? "" : "This model has no chat template, so it cannot chat.");
  } catch (error) {
    tell(error);
  }
}

// Messages

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function button(text, action) {
  const made = element("button", { type: "button", className: "quiet", textContent: text });
  made.addEventListener("click", action);
  return made;
}

function addMessage(role, text = "") {
  const content = element("div", { className: "content", textContent: text });
  const item = element("li", { className: role }, content);
  const message = { role, text, reasoning: "", tokens: [], item, content };
  messages.push(message);
  byId("messages").append(item);
  byId("welcome").hidden = true;
  item.scrollIntoView({ block: "end" });
  return message;
}

function removeMessage(message) {
  if (inspector.message === message) inspector.close();
  messages.splice(messages.indexOf(message), 1);
  message.item.remove();
}

function addReasoning(message, text) {
  if (!message.reasoning) {
    message.thoughts = element("div", { className: "thoughts" });
    const details = element("details", {}, element("summary", { textContent: "Reasoning" }), message.thoughts);
    message.item.prepend(details);
  }
  message.reasoning += text;
  message.thoughts.textContent = message.reasoning;
}

function addActions(message) {
  const actions = element("div", { className: "actions" });
  actions.append(button("Retry", () => retry(message)));
  if (message.text) actions.append(button("Copy", () => navigator.clipboard.writeText(message.text)));
  if (message.tokens.length) actions.append(button("Inspect", () => inspector.open(message)));
  if (message.note) actions.append(element("span", { className: "soft", textContent: message.note }));
  message.item.append(actions);
}

/** Follows an answer that grows with renderings of it, never two at a time. */
class Rendering {
  #message;
  #done = "";
  #busy = null;

  constructor(message) {
    this.#message = message;
  }

  update() {
    this.#busy ??= this.#render().finally(() => (this.#busy = null));
  }

  async end() {
    await this.#busy;
    if (this.#done !== this.#message.text) await this.#render();
  }

  async #render() {
    const text = this.#message.text;
    try {
      const html = await markdown(text, key());
      atBottom(() => (this.#message.content.innerHTML = trusted(html)));
      this.#done = text;
    } catch {
      atBottom(() => (this.#message.content.textContent = text)); // plain text is better than none
    }
    await new Promise((resolve) => setTimeout(resolve, RENDER_PAUSE_MS));
  }
}

/** Make a change, and stay at the end of the conversation if it was in sight. */
function atBottom(change) {
  const box = byId("conversation");
  const near = box.scrollHeight - box.scrollTop - box.clientHeight < 80;
  change();
  if (near) box.scrollTop = box.scrollHeight;
}

// An answer

async function answer() {
  const message = addMessage("assistant");
  const body = requestBody();
  message.item.classList.add("growing");
  running = new AbortController();
  showRunning(true);
  const rendering = new Rendering(message);
  const began = performance.now();
  try {
    for await (const chunk of chunks(body, key(), running.signal)) take(message, chunk, rendering);
    message.note = summary(message, performance.now() - began);
  } catch (error) {
    if (error.name === "AbortError") message.note = "stopped";
    else fail(message, error);
  } finally {
    running = null;
    showRunning(false);
  }
  if (message.text) await rendering.end();
  message.item.classList.remove("growing");
  atBottom(() => addActions(message));
}

function take(message, chunk, rendering) {
  const choice = chunk.choices[0];
  if (chunk.usage) message.usage = chunk.usage;
  if (!choice) return;
  if (choice.finish_reason) message.reason = choice.finish_reason;
  if (choice.abyssal) message.tokens.push(...choice.abyssal.tokens);
  if (choice.delta.reasoning_content) atBottom(() => addReasoning(message, choice.delta.reasoning_content));
  if (choice.delta.content) {
    message.text += choice.delta.content;
    rendering.update();
  }
  if (inspector.message === message) inspector.update();
}

function summary(message, milliseconds) {
  const count = message.usage?.completion_tokens;
  const rate = count ? `${count} tokens, ${(count / (milliseconds / 1000)).toFixed(1)}/s` : "";
  const full = message.reason === "length" ? "length limit reached" : "";
  return [rate, full].filter(Boolean).join(" · ");
}

function fail(message, error) {
  atBottom(() => message.item.append(element("p", { className: "fault", textContent: tell(error) })));
  message.error = !message.text;
}

function retry(message) {
  if (running) return;
  while (messages.at(-1) !== message) removeMessage(messages.at(-1));
  removeMessage(message);
  answer();
}

// The form

function showRunning(is) {
  byId("send").hidden = is;
  byId("stop").hidden = !is;
  say(is ? "answering …" : "");
}

function say(text) {
  byId("status").textContent = text;
}

/** Show a fault, and where to mend it; return its sentence. */
function tell(error) {
  const sentence = error instanceof Fault ? error.message : `a defect of this page: ${error.message}`;
  say(sentence);
  if (error.status === 401) {
    byId("settings").showModal();
    byId("key").focus();
  }
  return sentence;
}

function grow() {
  const box = byId("prompt");
  box.rows = Math.min(Math.max(box.value.split("\n").length, Math.ceil(box.value.length / 90), 1), 8);
}

function submit(event) {
  event.preventDefault();
  const text = byId("prompt").value;
  if (running || !text.trim()) return;
  byId("prompt").value = "";
  grow();
  addMessage("user", text);
  answer();
}

byId("composer").addEventListener("submit", submit);
byId("prompt").addEventListener("input", grow);
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
});
byId("stop").addEventListener("click", () => running?.abort());
byId("new").addEventListener("click", () => {
  running?.abort();
  while (messages.length) removeMessage(messages.at(-1));
  byId("welcome").hidden = false;
  byId("prompt").focus();
});
byId("open-settings").addEventListener("click", () => byId("settings").showModal());
byId("settings").addEventListener("close", () => {
  saveSettings();
  if (!model) meet();
});

loadSettings();
meet();
byId("prompt").focus();
