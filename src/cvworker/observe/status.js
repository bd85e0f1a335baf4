"use strict";
// Asks for status.json once a second while the tab is visible, and shows it.
// What the worker says is written as text only: codes and messages in it may come from anybody.

const EVERY_MS = 1000, TIMEOUT_MS = 5000, CURVE_MS = 5 * 60_000, RECENT_MS = 60_000;
const STEPS = ["receive", "download", "preprocess", "process", "callback"];
const QUEUE_BEFORE = { download: "download", preprocess: "inference", process: "inference", callback: "results" };
const LATENCIES = ["queue", "download", "preprocess", "process", "total"];
const CALLBACKS = ["2xx", "4xx", "5xx", "timeout", "error", "refused"];
const OUTCOMES = {
  answered: "answered", later: "tried again later", left: "left unanswered", lost: "lease lost", released: "given back",
};

const openedAt = new Date();
let answeredAt = null;
let looks = []; // {at, status} of the last minutes, oldest first
let limit = null; // the step found to limit the others at the last look
let timer = 0, asking = false;

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

/** Mean fill of a queue at the last five looks: a single one may meet a burst. */
function fill(name) {
  const queues = looks.slice(-5).map(({ status }) => status.queues[name]).filter(Boolean);
  return queues.length ? sum(queues.map((queue) => queue.depth / queue.limit)) / queues.length : 0;
}

/** The step that limits the others: the busiest after the last full queue, as all before that one wait for room. */
function limiting(status, memoryFull) {
  const full = (step) => fill(QUEUE_BEFORE[step]) > 0.9 || (memoryFull && step === "preprocess");
  let first = Math.max(0, STEPS.findLastIndex(full));
  if (STEPS[first] === "process") first -= 1; // one queue is before both
  const busy = (step) => (status.busy[step] ?? 0) + (step === limit ? 0.03 : 0); // no flicker between equals
  return STEPS.slice(first).reduce((best, step) => (busy(step) > busy(best) ? step : best));
}

/** Which setting would change a step. */
function advice(step, { settings, model, download_concurrency: downloads }) {
  const named = (name, now) => `${name} (${settings[name]}${settings[name] === "auto" && now ? `, now ${now}` : ""})`;
  return {
    receive: `A call brings 10 messages at most: raise ${named("receive_threads")}.`,
    download: `The image hosts or the network are slow, or ${named("download_concurrency", downloads)} is too low.`,
    preprocess: `Raise ${named("preprocess_workers")} if CPU cores are free, or set min_side in the module.`,
    process: `Raise ${named("batch_size")} if the device has memory left; else another ` +
      `${named("precision", model.precision)} or ${named("device", model.device)}.`,
    callback: `The receivers are slow or refuse, or ${named("callback_concurrency")} is too low.`,
  }[step];
}

/** What holds the worker back: how bad that is, in words, and which step to mark with what. */
function judge(status) {
  const { state, problems, missing, held, settings } = status;
  const found = (tone, text, hint, step, tag) => ({ tone, text, hint, step, tag });
  if (problems.length) return found("bad", `Failing: ${problems[0]}.`, [...problems.slice(1), ...missing].join("; "));
  if (state === "starting") return found("warn", "Starting: no messages taken yet.", missing.join("; "));
  if (state !== "running") {
    return found("warn", `Stopping: ${whole(held)} messages in hand.`, "What is not finished in time is given back.");
  }
  if (missing.length) {
    return found("warn", "Not ready.", missing.join("; "), status.queue.reachable ? null : "receive", "no queue");
  }
  if (!held && !status.rate_per_s) return found("good", "Idle: no messages to work on.", "Nothing here holds it back.");

  const memoryFull = status.image_bytes > 0.95 * settings.max_inflight_bytes;
  const step = limiting(status, memoryFull), busy = status.busy[step] ?? 0, waiting = fill(QUEUE_BEFORE[step]);
  if (memoryFull && busy < 0.5) {
    const hint = `Downloads wait for room: raise max_inflight_bytes (${mebibytes(settings.max_inflight_bytes)}).`;
    return found("warn", "Too little memory for images holds it back.", hint, "download", "waits for memory");
  }
  if (busy > 0.85 || waiting > 0.9 || (busy > 0.5 && waiting > 0.5)) {
    return found("warn", `${step} holds it back: ${percent(busy)} busy.`, advice(step, status), step, "holds it back");
  }
  if (busy < 0.05) return found("good", "It keeps up with what arrives.", "Every step has room.");
  const hint = `With more to do, ${step} would be first (${percent(busy)} busy). ${advice(step, status)}`;
  return found("good", "It keeps up with what arrives.", hint, step, "busiest");
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
  const { state, problems, missing, model } = status, verdict = judge(status);
  limit = verdict.step;
  const unready = state === "running" && missing.length > 0;
  const tone = problems.length ? "bad" : unready || state !== "running" ? "warn" : "good";
  put(byId("module"), model.module ?? status.settings.module ?? "cvworker");
  const device = [model.device, model.precision].filter(Boolean), up = duration(1000 * Math.floor(status.uptime_s));
  put(byId("about"), [...device, `cvworker ${status.version}`, `up ${up}`].join(" · "));
  showState(state + (problems.length ? ", failing" : unready ? ", not ready" : ""), tone, verdict);
  putList("notes", remarks(status));
  showFlow(status, verdict);
  showCurve(status);
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
    put(card.querySelector("b"), percent(share));
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
  const { download, model, callback } = status.in_hand;
  put(byId("hand-receive"), `${whole(status.held)} held in all`);
  put(byId("hand-download"), `${whole(download)} of ${whole(status.download_concurrency)} in hand`);
  put(byId("hand-model"), `${whole(model)} in hand in the model process`);
  put(byId("hand-callback"), `${whole(callback)} in hand`);
}

function showCurve(status) {
  const now = looks.at(-1).at, most = Math.max(1, ...looks.map((look) => look.status.rate_per_s));
  const power = 10 ** Math.floor(Math.log10(most));
  const top = [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((n) => n * power).find((n) => n >= most);
  const points = looks.map(({ at, status: { rate_per_s: rate } }, n) => {
    const joined = n && at - looks[n - 1].at <= TIMEOUT_MS; // a pause stays a gap
    return `${joined ? "L" : "M"}${300 * (1 - (now - at) / CURVE_MS)} ${100 - (100 * rate) / top}`;
  });
  byId("line").setAttribute("d", points.join(""));
  byId("curve").setAttribute("aria-label", `Messages a second: now ${tenths(status.rate_per_s)}, most ${tenths(most)}`);
  put(byId("top"), `${top}/s`);
  put(byId("rate"), tenths(status.rate_per_s));
  put(byId("pace"), status.pace_per_s ? `it can do about ${tenths(status.pace_per_s)}` : "");
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
  const time = (step, which) => (latency[step] ? duration(latency[step][which]) : "–");
  putRows("latency", LATENCIES.map((step) => [step, time(step, "p50"), time(step, "p95")]));
  putRows("facts", [
    ["queue", queue.url],
    ["dead-letter queue", queue.max_receives === null ? "none" : `after ${queue.max_receives} receives`],
    ["weights", model.weights ?? "–"],
    status.processes
      ? ["pipelines", status.processes.map(({ pid, state }) => (pid ? `pid ${pid} ${state}` : state)).join(", ")]
      : ["model process", model.pid ? `pid ${model.pid}` : "–"],
    ["image memory", `${mebibytes(status.image_bytes)} of ${mebibytes(settings.max_inflight_bytes)}`],
  ]);
  const plain = (value) => (value === null ? "–" : typeof value === "object" ? JSON.stringify(value) : value);
  putRows("settings", Object.entries(settings).map(([name, value]) => [name, plain(value)]));
}

// Asking

async function ask() {
  asking = true;
  let status = null, why = "";
  try {
    const response = await fetch("status.json", { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
    if (response.ok) status = await response.json();
    else why = `it answers HTTP ${response.status}`;
  } catch (error) {
    why = error.name === "TimeoutError" ? `nothing within ${TIMEOUT_MS / 1000} s` : "the connection fails";
  }
  asking = false;
  schedule(EVERY_MS);
  try {
    if (status) take(status);
    else lost(why);
  } catch (error) { // another version's answer
    console.error(error);
    looks = [];
    lost("this page cannot read what it answers; load it again");
  }
}

function take(status) {
  const at = performance.now();
  if (looks.length && status.uptime_s < looks.at(-1).status.uptime_s) looks = []; // it was started anew
  looks = [...looks.filter((look) => at - look.at <= CURVE_MS), { at, status }];
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

function schedule(wait) {
  clearTimeout(timer);
  if (!document.hidden && !asking) timer = setTimeout(ask, wait);
}

document.addEventListener("visibilitychange", () => schedule(0));
schedule(0);
