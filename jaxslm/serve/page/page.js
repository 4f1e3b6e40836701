"use strict";

// The page proposes postings by BM25, as a search engine would, and has the server rank them: by their text, and, where
// the server has an item store, by their stored vectors. Text from outside enters the page as textContent only.

const byId = (id) => document.getElementById(id);
const DEPTHS = [10, 25, 50, 100, 250, 1000];
const PARTS = [
  ["tokenise", "x-tokenization-time"],
  ["queue", "x-queue-time"],
  ["model", "x-inference-time"],
  ["respond", "x-response-time"],
];

let demo = { items: [], store: false, max_items: 1000 };
let index = null;
let running = null;

// --- the server -----------------------------------------------------------------------------------------------------

class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function call(path, body, signal) {
  const headers = {};
  const key = byId("key").value.trim();
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  const start = performance.now();
  let response, content;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) });
    content = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "The server does not answer.");
  }
  if (!response.ok) throw new Refusal(response.status, content.message ?? `The server answered ${response.status}.`);
  return { content, headers: response.headers, elapsed: performance.now() - start };
}

function latency({ headers, elapsed }) {
  const parts = PARTS.map(([name, header]) => [name, Number(headers.get(header) ?? 0)]);
  const onServer = Number(headers.get("x-total-time") ?? 0);
  parts.push(["network", Math.max(0, elapsed - onServer)]);
  return { parts, total: elapsed, tokens: Number(headers.get("x-compute-tokens") ?? 0) };
}

async function rankText(query, postings, signal) {
  const documents = postings.map(({ title, text }) => ({ title, text }));
  const answer = await call("/v1/rerank", { query, documents, return_documents: false }, signal);
  const ranked = answer.content.results.map((result) => ({ posting: postings[result.index], score: result.relevance_score }));
  return { ranked, missing: 0, ...latency(answer) };
}

async function rankVectors(query, postings, signal) {
  const body = { query, item_ids: postings.map((posting) => posting.id), on_miss: "skip" };
  const answer = await call("/v1/score", body, signal);
  const { scores, logits } = answer.content;
  const ranked = postings
    .map((posting, place) => ({ posting, score: scores[place]?.[1], logit: logits[place] }))
    .filter((row) => row.score !== undefined)
    .sort((a, b) => b.logit - a.logit);
  return { ranked, missing: postings.length - ranked.length, ...latency(answer) };
}

// --- BM25 -----------------------------------------------------------------------------------------------------------

// Without the s of plurals: people ask for a developer, and postings are about developers.
const words = (text) => (text.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? []).map((word) => word.replace(/(?<=\p{L}{2}[^s])s$/u, ""));

function buildIndex(items) {
  const postings = new Map();
  const lengths = items.map(({ title, text }, place) => {
    const counts = new Map();
    const all = words(`${title ?? ""} ${text}`);
    for (const word of all) counts.set(word, (counts.get(word) ?? 0) + 1);
    for (const [word, count] of counts) {
      if (!postings.has(word)) postings.set(word, []);
      postings.get(word).push([place, count]);
    }
    return all.length;
  });
  const mean = lengths.reduce((sum, length) => sum + length, 0) / Math.max(1, items.length);
  return { items, postings, lengths, mean };
}

const isFound = (query) => words(query).some((word) => index.postings.has(word));

function propose(query, depth) {
  const { items, postings, lengths, mean } = index;
  const scores = new Float64Array(items.length);
  for (const word of new Set(words(query))) {
    const found = postings.get(word) ?? [];
    const rarity = Math.log(1 + (items.length - found.length + 0.5) / (found.length + 0.5));
    for (const [place, count] of found) {
      scores[place] += (rarity * count * 2.2) / (count + 1.2 * (0.25 + (0.75 * lengths[place]) / mean));
    }
  }
  const order = items.map((_, place) => place).sort((a, b) => scores[b] - scores[a] || a - b);
  return order.slice(0, depth).map((place) => items[place]);
}

// --- what is shown --------------------------------------------------------------------------------------------------

const milliseconds = (value) => (value >= 100 ? value.toFixed(0) : value.toFixed(1)) + " ms";
const probability = (value) => (value >= 0.001 ? value.toFixed(3) : value.toExponential(0));

function say(text, isError = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("error", isError);
}

function column(heading) {
  const section = byId("column").content.cloneNode(true).firstElementChild;
  section.querySelector("h2").textContent = heading;
  section.querySelector(".latency").hidden = true;
  section.querySelector(".summary").textContent = "…";
  byId("columns").append(section);
  return section;
}

function showSplit(section, { parts }, longest) {
  const list = section.querySelector(".split");
  list.replaceChildren();
  let before = 0;
  for (const [name, value] of parts) {
    const [row, label, track, bar, number] = ["li", "span", "span", "span", "span"].map((tag) => document.createElement(tag));
    label.textContent = name;
    number.textContent = milliseconds(value);
    track.className = "track";
    track.setAttribute("aria-hidden", "true");
    bar.style.marginLeft = `${(100 * before) / longest}%`;
    bar.style.width = `${(100 * value) / longest}%`;
    track.append(bar);
    row.append(label, track, number);
    list.append(row);
    before += value;
  }
  section.querySelector(".latency").hidden = false;
}

function showRanking(section, result, other) {
  const { ranked, missing, total, tokens } = result;
  const speed = (1000 * ranked.length) / total;
  const absent = missing ? `; ${missing} not in the store` : "";
  section.querySelector(".summary").textContent =
    `${ranked.length} postings in ${milliseconds(total)}: ${speed.toFixed(speed < 10 ? 1 : 0)} a second, ` +
    `${tokens.toLocaleString("en")} tokens${absent}`;
  const places = new Map((other?.ranked ?? []).map((row, place) => [row.posting, place]));
  const list = section.querySelector(".ranking");
  list.replaceChildren(
    ...ranked.map(({ posting, score }, place) => {
      const row = byId("posting").content.cloneNode(true).firstElementChild;
      row.querySelector(".rank").textContent = `${place + 1}`;
      row.querySelector(".title").textContent = posting.title ?? posting.text.slice(0, 80);
      row.querySelector(".filled").style.width = `${100 * score}%`;
      row.querySelector(".score").textContent = probability(score);
      row.querySelector(".text").textContent = posting.text;
      if (places.has(posting)) showMove(row.querySelector(".moved"), places.get(posting) - place);
      return row;
    }),
  );
}

function showMove(element, up) {
  element.textContent = up > 0 ? `▲ ${up}` : up < 0 ? `▼ ${-up}` : "=";
  const said = up === 0 ? "the same place as" : `${Math.abs(up)} places ${up > 0 ? "higher" : "lower"} than`;
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", `${said} by full text`);
  element.title = `${said} by full text`;
}

function show(columns, results) {
  const longest = Math.max(...Object.values(results).map((result) => result.total), 1e-3);
  for (const [kind, result] of Object.entries(results)) {
    showSplit(columns[kind], result, longest);
    showRanking(columns[kind], result, kind === "vectors" ? results.text : undefined);
  }
}

function summary({ text, vectors }) {
  const said = [`Ranked ${text.ranked.length} postings by full text in ${milliseconds(text.total)}`];
  if (vectors) {
    said.push(`by stored vectors in ${milliseconds(vectors.total)}, ${(text.total / vectors.total).toFixed(1)} times as fast`);
  }
  return said.join("; ") + ".";
}

// --- what a person does -----------------------------------------------------------------------------------------------

async function rank(event) {
  event.preventDefault();
  const query = byId("query").value.trim();
  if (!query) return;
  running?.abort();
  running = new AbortController();
  const { signal } = running;
  byId("columns").replaceChildren();
  say("Ranking…");
  try {
    if (!index) await loadDemo();
    const own = byId("own").value.split("\n").map((line) => line.trim()).filter(Boolean);
    const postings = demo.items.length ? propose(query, Number(byId("depth").value)) : own.map((text) => ({ title: null, text }));
    if (!postings.length) {
      say("There is nothing to rank: write postings into the field, one per line.", true);
      byId("own").focus();
      return;
    }
    // One after the other, so that neither waits for the other on the device.
    const columns = { text: column("Full text") };
    if (demo.store && demo.items.length) columns.vectors = column("Compressed");
    const results = {};
    if (columns.vectors) {
      results.vectors = await rankVectors(query, postings, signal);
      show(columns, results);
    }
    results.text = await rankText(query, postings, signal);
    show(columns, results);
    const unlike = demo.items.length && !isFound(query) ? "No posting has a word of this: these are the first ones. " : "";
    say(unlike + summary(results));
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof Refusal)) throw error;
    byId("columns").querySelectorAll(".column:not(:has(.ranking li))").forEach((section) => section.remove());
    say(error.message, true);
    if (error.status === 401) askForKey();
  }
}

function askForKey() {
  byId("key-field").hidden = false;
  byId("key").focus();
}

async function loadDemo() {
  demo = (await call("/demo/items")).content;
  index = buildIndex(demo.items);
  byId("model").textContent = demo.model;
  byId("own-field").hidden = demo.items.length > 0;
  byId("depth-field").hidden = demo.items.length === 0;
  const most = Math.min(demo.items.length, demo.max_items);
  const depths = [...DEPTHS.filter((depth) => depth < most), most];
  byId("depth").replaceChildren(
    ...depths.map((depth) => new Option(depth === demo.items.length ? `all ${depth}` : `best ${depth} by BM25`, depth)),
  );
  if (depths.length > 1) byId("depth").value = depths[1] < most ? depths[1] : depths[0];
}

async function watchHealth() {
  const said = { ready: "ready", warming: "warming up: compiling", draining: "about to stop" };
  let state;
  try {
    state = (await (await fetch("/health/ready")).json()).status;
  } catch {
    state = "no answer";
  }
  const text = said[state] ?? state.replaceAll("_", " ");
  if (byId("health").textContent !== text) byId("health").textContent = text;
  byId("health").dataset.ready = state === "ready";
  setTimeout(watchHealth, state === "ready" ? 15000 : 1500);
}

byId("search").addEventListener("submit", rank);
byId("key").addEventListener("change", () => index || loadDemo().then(() => say(""), (error) => say(error.message, true)));
watchHealth();
loadDemo().catch((error) => {
  if (error.status !== 401) return say(error.message, true);
  say("This server wants an API key.", true);
  askForKey();
});
