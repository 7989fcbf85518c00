"use strict";
// The page: a prompt that is written on, streamed from POST /v1/completions of the server it came from.

const $ = (id) => document.getElementById(id);
const KNOBS = ["temperature", "top_p", "top_k", "max_tokens", "presence_penalty", "frequency_penalty"];
const DEFAULTS = {temperature: 0.8, top_p: 0.95, top_k: 0, max_tokens: 64, presence_penalty: 0, frequency_penalty: 0.3};
const EN = {continuation: "Continue", couplet: "Couplet", dialogue: "Dialogue", poem: "Poem",
  question_answering: "Q&A", quickstart: "Small world", summary: "Summary"};
const ORDER = ["summary", "question_answering", "dialogue", "couplet", "poem", "continuation", "quickstart"];
const knob = (name) => document.querySelector(`[name="${name}"]`);
let offer = {recipes: [], context: 1024}, recipe = null, running = null, example = 0;

function state(kind, words) {
  $("state").className = kind;
  $("state").querySelector("b").textContent = words;
}

function fail(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

// -- recipes ----------------------------------------------------------------------------------------------------------

function filled() {
  const values = {};
  for (const area of $("inputs").querySelectorAll("textarea")) values[area.name] = area.value;
  return recipe.template.replace(/\{\{|\}\}|\{(\w+)\}/g, (all, name) => name ? values[name] ?? "" : all[0]);
}

function choose(chosen) {
  stop();
  if (recipe === chosen) example += 1; else example = 0;
  recipe = chosen;
  for (const button of $("recipes").children) button.setAttribute("aria-pressed", button.dataset.name === (recipe?.name ?? ""));
  $("inputs").replaceChildren();
  $("about").textContent = recipe?.about ?? "Any beginning, without a recipe.";
  clear();
  if (!recipe) {
    $("prompt").textContent = "";
    set(DEFAULTS, []);
    changed();
    return;
  }
  const inputs = recipe.inputs.length ? recipe.inputs[example % recipe.inputs.length] : {};
  const plain = recipe.names.length === 1 && recipe.template === `{${recipe.names[0]}}`;
  if (plain) {
    $("prompt").textContent = inputs[recipe.names[0]] ?? "";
  } else {
    for (const name of recipe.names) {
      const label = document.createElement("label"), words = document.createElement("span");
      const area = document.createElement("textarea");
      words.textContent = name;
      Object.assign(area, {name, value: inputs[name] ?? "", rows: 1});
      area.addEventListener("input", () => { clear(); $("prompt").textContent = filled(); changed(); });
      label.append(words, area);
      $("inputs").append(label);
    }
    $("prompt").textContent = filled();
  }
  const own = recipe.generate;
  set({...DEFAULTS, top_p: 1, frequency_penalty: 0, ...own, max_tokens: own.max_new_tokens ?? DEFAULTS.max_tokens}, own.stop ?? []);
  changed();
}

function show() {
  const byOrder = (a, b) => (ORDER.indexOf(a.name) + 99) % 99 - (ORDER.indexOf(b.name) + 99) % 99;
  for (const one of [null, ...offer.recipes.slice().sort(byOrder)]) {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.name = one?.name ?? "";
    button.textContent = one ? [one.title, EN[one.name]].filter(Boolean).join(" · ") : "Blank";
    button.addEventListener("click", () => choose(one));
    $("recipes").append(button);
  }
}

// -- sampling ---------------------------------------------------------------------------------------------------------

function set(values, stops) {
  for (const name of KNOBS) knob(name).value = values[name];
  knob("stop").value = stops.map((text) => text.replaceAll("\n", "\\n")).join(" | ");
  outputs();
}

function outputs() {
  for (const name of KNOBS) {
    const value = Number(knob(name).value);
    knob(name).parentElement.querySelector("output").textContent = name === "top_k" && !value ? "all" : value;
  }
}

function stops() {
  const text = knob("stop").value;
  return text ? text.split("|").map((one) => one.trim().replaceAll("\\n", "\n")).filter(Boolean) : [];
}

// -- generation -------------------------------------------------------------------------------------------------------

function changed() {
  const prompt = $("prompt").textContent, answer = $("answer").textContent;
  $("hint").hidden = Boolean(prompt || answer || running);
  $("keep").disabled = Boolean(running) || !answer;
  $("again").disabled = Boolean(running) || !(answer || prompt);
}

function clear() {
  $("answer").textContent = "";
  fail("");
  for (const name of ["prompt", "made", "first", "speed"]) $(`f-${name}`).textContent = "–";
  changed();
}

function stop() {
  running?.abort();
}

function body() {
  const made = {model: offer.model, prompt: $("prompt").textContent, stream: true, stream_options: {include_usage: true}};
  for (const name of KNOBS) made[name] = Number(knob(name).value);
  if (stops().length) made.stop = stops();
  const seed = knob("seed").value.trim();
  if (seed) made.seed = /^-?\d{1,15}$/.test(seed) ? Number(seed) : seed;
  return made;
}

async function generate() {
  if (running) { stop(); return; }
  clear();
  const mine = running = new AbortController();
  const begun = performance.now();
  let first = 0, made = 0;
  $("go").classList.add("stop");
  $("go").firstChild.textContent = "Stop";
  $("caret").hidden = false;
  state("busy", "writing");
  changed();
  const count = (tokens) => {
    const now = performance.now();
    $("f-made").textContent = tokens;
    if (tokens > 1 && now > first) $("f-speed").textContent = ((tokens - 1) / (now - first) * 1000).toFixed(1);
  };
  try {
    for await (const event of events(body(), mine.signal)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) {
        $("f-prompt").textContent = event.usage.prompt_tokens;
        count(event.usage.completion_tokens);
      }
      for (const choice of event.choices ?? []) {
        if (!first) { first = performance.now(); $("f-first").textContent = `${Math.round(first - begun)} ms`; }
        made += 1;
        $("answer").append(choice.text);
        if (choice.finish_reason) state("ok", choice.finish_reason === "stop" ? "ended by itself" : "length reached");
        count(made);
        $("text").scrollTop = $("text").scrollHeight;
      }
    }
  } catch (error) {
    if (mine.signal.aborted) state("ok", "stopped");
    else { state("off", "error"); fail(error.message); }
  } finally {
    if (running === mine) running = null;
    $("go").classList.remove("stop");
    $("go").firstChild.textContent = "Generate";
    $("caret").hidden = true;
    changed();
  }
}

async function* events(request, signal) {
  const headers = {"content-type": "application/json"};
  if (knob("key").value) headers.authorization = `Bearer ${knob("key").value}`;
  const answer = await fetch("/v1/completions", {method: "POST", headers, signal, body: JSON.stringify(request)});
  if (!answer.ok) {
    const told = await answer.json().catch(() => null);
    throw new Error(told?.error?.message ?? `the server answered ${answer.status}`);
  }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const {done, value} = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

// -- the page ---------------------------------------------------------------------------------------------------------

$("go").addEventListener("click", generate);
$("keep").addEventListener("click", () => {
  const more = $("answer").textContent;
  clear();
  $("prompt").textContent += more;
  generate();
});
$("again").addEventListener("click", () => {
  if (!$("answer").textContent) $("prompt").textContent = "";
  clear();
  $("prompt").focus();
});
$("prompt").addEventListener("input", () => { $("answer").textContent = ""; changed(); });
$("text").addEventListener("click", (event) => { if (event.target === $("text")) $("prompt").focus(); });
$("settings").addEventListener("input", outputs);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); generate(); }
  if (event.key === "Escape") stop();
});
$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  root.dataset.theme = dark ? "light" : "dark";
  try { localStorage.theme = root.dataset.theme; } catch { /* private windows */ }
});
try { if (localStorage.theme) document.documentElement.dataset.theme = localStorage.theme; } catch { /* private windows */ }

fetch("/recipes").then((answer) => answer.json()).then((found) => {
  offer = found;
  $("model").textContent = `${offer.model} · ${offer.context} tokens`;
  $("key-label").hidden = !offer.needs_key;
  if (offer.needs_key) $("settings").open = true;
  knob("max_tokens").max = Math.max(16, Math.min(1024, offer.context - 1));
  show();
  choose(offer.recipes.find((one) => one.name === "summary") ?? null);
  state("ok", "ready");
}).catch(() => state("off", "the server does not answer"));
