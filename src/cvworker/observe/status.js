"use strict";
// Is sent the status once a second while the tab is visible, and shows it.
// What the worker says is written as text only: codes and messages in it may come from anybody.

const EVERY_MS = 1000, TIMEOUT_MS = 5000, CURVE_S = 5 * 60, RECENT_MS = 60_000, PACE_MS = 10_000;
const EXAMPLES = 8;
const LATENCIES = ["queue", "download", "preprocess", "process", "total"];
const CALLBACKS = ["2xx", "4xx", "5xx", "timeout", "error", "refused"];
const OUTCOMES = {
  answered: "answered", later: "tried again later", left: "left unanswered", lost: "lease lost", released: "given back",
};

const openedAt = new Date();
let answeredAt = null;
let looks = []; // {at, status} of the last minutes, oldest first
let timer = 0, asking = false, stream = null;

const byId = (id) => document.getElementById(id);
const whole = (number) => number.toLocaleString("en", { maximumFractionDigits: 0 });
const tenths = (number) => number.toLocaleString("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
const percent = (share) => `${Math.round(100 * share)}%`;
const mebibytes = (bytes) => `${whole(bytes / 2 ** 20)} MiB`;
const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

function put(element, value) {
  const text = String(value);
  if (element.textContent !== text) element.textContent = text; // what is the same stays selected and unannounced
}

function duration(ms) {
  const s = ms / 1000;
  if (s < 1) return `${ms < 10 ? tenths(ms) : whole(ms)} ms`;
  if (s < 60) return `${Number.isInteger(s) ? s : tenths(s)} s`;
  const [large, unit, small, rest] =
    s < 3600 ? [60, "min", 1, "s"] : s < 86400 ? [3600, "h", 60, "min"] : [86400, "d", 3600, "h"];
  return `${Math.floor(s / large)} ${unit} ${Math.floor((s % large) / small)} ${rest}`;
}

/** Give a tbody these rows; the first cell of each is its header. */
function putRows(id, rows) {
  const body = byId(id);
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((cells, y) => {
    const row = body.rows[y] ?? body.insertRow();
    cells.forEach((cell, x) => {
      if (!row.cells[x]) row.append(document.createElement(x ? "td" : "th"));
      put(row.cells[x], cell);
    });
    row.cells[0].scope = "row";
  });
}

// What the numbers mean

/** How much each counter of a kind has grown over the last minute, or since this page was opened. */
function growth(kind) {
  const now = looks.at(-1), then = looks.find(({ at }) => now.at - at <= RECENT_MS);
  const grown = ([key, count]) => [key, count - (then.status[kind][key] ?? 0)];
  return Object.fromEntries(Object.entries(now.status[kind]).map(grown));
}

/** What a step has done a second over the last seconds: messages, images or requests; null before two looks. */
function pace(step) {
  const now = looks.at(-1), then = looks.find(({ at }) => now.at - at <= PACE_MS);
  const seconds = now.status.uptime_s - then.status.uptime_s; // by the worker's clock: answers come late at times
  return seconds > 0 ? Math.max(0, now.status.done[step] - then.status.done[step]) / seconds : null;
}

/** What else one should know of the last minute. */
function remarks(status) {
  const found = [];
  for (const [kind, good, what] of [["messages", "answered", "answered"], ["callbacks", "2xx", "accepted"]]) {
    const grown = Object.entries(growth(kind)).filter(([key]) => key !== "released");
    const bad = grown.filter(([key, count]) => key !== good && count > 0).sort((a, b) => b[1] - a[1]);
    const all = sum(grown.map(([, count]) => count)), failed = sum(bad.map(([, count]) => count));
    if (failed < 5 || failed < 0.1 * all) continue;
    const parts = bad.map(([key, count]) => `${OUTCOMES[key] ?? key} ${whole(count)}`);
    found.push(`${whole(failed)} of the last ${whole(all)} ${kind} were not ${what}: ${parts.join(", ")}`);
  }
  if (status.model.restarts) found.push(`the model process has ended unasked ${whole(status.model.restarts)} times`);
  return found;
}

// Showing it

function show(status) {
  const { state, problems, missing, model, verdict } = status;
  const unready = state === "running" && missing.length > 0;
  const tone = problems.length ? "bad" : unready || state !== "running" ? "warn" : "good";
  put(byId("module"), model.module ?? status.settings.module ?? "cvworker");
  const device = [model.device, model.precision].filter(Boolean), up = duration(1000 * Math.floor(status.uptime_s));
  put(byId("about"), [...device, `cvworker ${status.version}`, `up ${up}`].join(" · "));
  showState(state + (problems.length ? ", failing" : unready ? ", not ready" : ""), tone, verdict);
  putList("notes", remarks(status));
  showFlow(status, verdict);
  showCurves(status);
  showTables(status);
}

function showState(state, tone, verdict) {
  put(byId("state"), state);
  byId("state").dataset.tone = tone;
  document.title = `${state} · ${byId("module").textContent}`;
  byId("verdict").dataset.tone = verdict.tone;
  put(byId("limit"), verdict.text);
  put(byId("hint"), verdict.hint);
}

function putList(id, texts) {
  const list = byId(id);
  while (list.children.length > texts.length) list.lastElementChild.remove();
  texts.forEach((text, n) => put(list.children[n] ?? list.appendChild(document.createElement("li")), text));
}

function showFlow(status, { step, tag }) {
  for (const card of document.querySelectorAll("[data-step]")) {
    const share = status.busy[card.dataset.step] ?? 0, marked = card.dataset.step === step;
    const done = pace(card.dataset.step);
    put(card.querySelector("b"), percent(share));
    put(card.querySelector(".pace"), done === null ? "" : `${done < 10 ? tenths(done) : whole(done)}/s`);
    card.querySelector("meter").value = share;
    put(card.querySelector(".tag"), marked ? tag : "");
    if (marked) card.dataset.mark = tag;
    else delete card.dataset.mark;
  }
  for (const line of document.querySelectorAll("[data-queue]")) {
    const { depth, limit: most } = status.queues[line.dataset.queue] ?? { depth: 0, limit: 1 };
    put(line.querySelector("b"), `${whole(depth)}/${whole(most)}`);
    line.querySelector("meter").value = depth / most;
    line.dataset.full = depth >= most;
  }
  const { visible } = status.backlog, { download, model, callback } = status.in_hand;
  put(byId("backlog"), visible === null ? "–" : whole(visible));
  put(byId("eta"), visible && status.rate_per_s ? `${duration((1000 * visible) / status.rate_per_s)} at this pace` : "");
  const batches = pace("batches"), size = status.settings.batch_size;
  put(byId("batches"), batches ? `batches of ${tenths(pace("process") / batches)}, at most ${size}` : `batches of ${size}`);
  put(byId("hand-receive"), `${whole(status.held)} held in all`);
  put(byId("hand-download"), `${whole(download)} of ${whole(status.download_concurrency)} in hand`);
  put(byId("hand-model"), `${whole(model)} in hand in the model process`);
  put(byId("hand-callback"), `${whole(callback)} in hand`);
}

/** The least round number that is not below what is to be drawn. */
function roundUp(most) {
  const power = 10 ** Math.floor(Math.log10(most));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((n) => n * power).find((n) => n >= most);
}

/** Draw lines, a point every so many seconds and the newest at the right; where a value is missing stays a gap. */
function draw(id, lines, every, least, named) {
  const values = lines.flat().filter((value) => value !== null), top = roundUp(Math.max(least, ...values));
  byId(id).querySelectorAll("path").forEach((path, n) => {
    const points = lines[n].map((value, at) => {
      const ago = (lines[n].length - 1 - at) * every, joined = at && lines[n][at - 1] !== null;
      return value === null ? "" : `${joined ? "L" : "M"}${300 * (1 - ago / CURVE_S)} ${100 - (100 * value) / top}`;
    });
    path.setAttribute("d", points.join(""));
  });
  put(byId(id).parentElement.querySelector(".top"), named(top));
}

function showCurves({ history, rate_per_s: rate, pace_per_s: able, latency_ms: latency }) {
  draw("curve", [[...history.rate_per_s, rate]], history.every_s, 1, (top) => `${top}/s`);
  byId("curve").setAttribute("aria-label", `Messages a second: now ${tenths(rate)}`);
  put(byId("rate"), tenths(rate));
  put(byId("pace"), able ? `it can do about ${tenths(able)}` : "");
  draw("took", [history.p50_ms, history.p95_ms], history.every_s, 10, duration);
  const { p50, p95 } = latency.total ?? {}, time = (ms) => (ms === undefined ? "–" : duration(ms));
  byId("took").setAttribute("aria-label", `Sent to answered: p50 ${time(p50)}, p95 ${time(p95)}`);
  put(byId("middle"), time(p50));
  put(byId("late"), time(p95));
}

function showTables(status) {
  const { model, queue, settings, latency_ms: latency } = status;
  const seconds = Math.round(Math.min(RECENT_MS, looks.at(-1).at - looks[0].at) / 1000);
  for (const cell of document.querySelectorAll("[data-window]")) put(cell, `last ${seconds} s`);
  for (const [kind, known] of [["messages", Object.keys(OUTCOMES)], ["callbacks", CALLBACKS], ["errors", []]]) {
    const all = status[kind], grown = growth(kind), keys = [...new Set([...known, ...Object.keys(all).sort()])];
    const rows = keys.map((key) => [OUTCOMES[key] ?? key, whole(grown[key] ?? 0), whole(all[key] ?? 0)]);
    putRows(kind, rows.length ? rows : [["none", 0, 0]]);
  }
  const since = (seconds) => (seconds === null ? "–" : duration(1000 * Math.round(seconds)));
  const time = (step, which) => (latency[step] ? duration(latency[step][which]) : "–");
  putRows("latency", LATENCIES.map((step) => [step, time(step, "p50"), time(step, "p95")]));
  putRows("facts", [
    ["queue", queue.url],
    ["dead-letter queue", queue.max_receives === null ? "none" : `after ${queue.max_receives} receives`],
    ["weights", model.weights ?? "–"],
    status.processes
      ? ["pipelines", status.processes.map(({ pid, state }) => (pid ? `pid ${pid} ${state}` : state)).join(", ")]
      : ["model process", model.pid ? `pid ${model.pid}` : "–"],
    ["leases", `${whole(status.held)} held, the oldest sent ${since(status.leases.oldest_s)} ago`],
    ["leases so far", `${whole(status.leases.extended)} extended, ${whole(status.leases.lost)} lost`],
    ["image memory", `${mebibytes(status.image_bytes)} of ${mebibytes(settings.max_inflight_bytes)}`],
  ]);
  const latest = status.examples.slice(-EXAMPLES).reverse();
  const clock = (at) => new Date(1000 * at).toLocaleTimeString("en-GB");
  putRows("examples", latest.map(({ at, code, id, message }) => [clock(at), code, id, message]));
  byId("latest").hidden = !latest.length;
  const plain = (value) => (value === null ? "–" : typeof value === "object" ? JSON.stringify(value) : value);
  putRows("settings", Object.entries(settings).map(([name, value]) => [name, plain(value)]));
}

// Being told, and asking where that fails

function listen() {
  hush();
  stream = new EventSource("events");
  stream.onmessage = ({ data }) => {
    wait(TIMEOUT_MS, ask);
    read(data);
  };
  stream.onerror = ask; // it does not say what is wrong
  wait(TIMEOUT_MS, ask);
}

/** Ask once: for the status where no events come, or why there is none; then listen again. */
async function ask() {
  hush();
  if (asking) return;
  asking = true;
  let text = "", why = "";
  try {
    const response = await fetch("status.json", { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
    if (response.ok) text = await response.text();
    else why = `it answers HTTP ${response.status}`;
  } catch (error) {
    why = error.name === "TimeoutError" ? `nothing within ${TIMEOUT_MS / 1000} s` : "the connection fails";
  }
  asking = false;
  wait(EVERY_MS, listen);
  if (text) read(text);
  else lost(why);
}

function read(text) {
  try {
    take(JSON.parse(text));
  } catch (error) { // another version's answer
    console.error(error);
    looks = [];
    lost("this page cannot read what it answers; load it again");
  }
}

function take(status) {
  const at = performance.now();
  if (looks.length && status.uptime_s < looks.at(-1).status.uptime_s) looks = []; // it was started anew
  looks = [...looks.filter((look) => at - look.at <= RECENT_MS), { at, status }];
  show(status);
  answeredAt = new Date();
  put(byId("seen"), `Last answer ${answeredAt.toLocaleTimeString()}`);
  byId("main").dataset.from = "now";
}

function lost(why) {
  const since = answeredAt ?? openedAt, ago = duration(1000 * Math.max(1, Math.round((Date.now() - since) / 1000)));
  const hint = `For ${ago}: ${why}.${answeredAt ? " What stands below is from then." : ""}`;
  showState("no answer", "bad", { tone: "bad", text: `No answer since ${since.toLocaleTimeString()}.`, hint });
  putList("notes", []);
  if (answeredAt) byId("main").dataset.from = "then";
}

function hush() {
  clearTimeout(timer);
  stream?.close();
  stream = null;
}

function wait(ms, then) {
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(then, ms);
}

document.addEventListener("visibilitychange", () => (document.hidden ? hush() : listen()));
if (!document.hidden) listen();
