"use strict";
const EVERY_MS = 1000, LIMIT_MS = 8000, KEY = "flashrl.token";
const $ = (id) => document.getElementById(id);
let seen = null, timer = 0, turn = 0;

// every value goes through textContent or a number: nothing the service says can become markup
function text(id, value) {
  const element = $(id), next = String(value);
  if (element.textContent !== next) element.textContent = next;
}
function count(value) { return Math.round(value).toLocaleString("en-US"); }
function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  while (value >= 999.5 && at < units.length - 1) { value /= 1000; at += 1; }
  return (at ? value.toFixed(value < 9.995 ? 2 : value < 99.95 ? 1 : 0) : String(value)) + " " + units[at];
}
function percent(share) { return (100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0) + " %"; }
function duration(seconds) {
  const s = Math.floor(seconds), d = Math.floor(s / 86400), h = Math.floor(s / 3600) % 24, m = Math.floor(s / 60) % 60;
  if (d) return d + " d " + h + " h";
  if (h) return h + " h " + m + " min";
  return m ? m + " min " + (s % 60) + " s" : s + " s";
}
function bar(id, share) {
  const value = Math.min(1, Math.max(0, share || 0));
  $(id).firstElementChild.style.width = 100 * value + "%";
  for (const [name, to] of [["valuemin", 0], ["valuemax", 100], ["valuenow", Math.round(100 * value)]]) $(id).setAttribute("aria-" + name, to);
}

function spark(throughput) {
  const values = throughput.history, svg = $("spark"), top = Math.max(1, ...values), last = Math.max(1, values.length - 1);
  const points = values.map((value, i) => (300 * i / last).toFixed(1) + "," + (46 - 44 * value / top).toFixed(1)).join(" ");
  const shapes = [["line", { x1: 0, y1: 47, x2: 300, y2: 47, class: "base" }]];
  if (values.length > 1) shapes.push(["polygon", { points: "0,47 " + points + " 300,47", class: "area" }], ["polyline", { points, class: "line" }]);
  svg.replaceChildren(...shapes.map(([name, attributes]) => {
    const shape = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) shape.setAttribute(key, value);
    return shape;
  }));
  const span = duration(values.length * throughput.interval_s), high = values.length ? Math.max(...values) : 0;
  svg.setAttribute("aria-label", "Tokens a second over the last " + span + ", at most " + count(high));
  text("span", span + " ago");
  text("highest", "at most " + count(high));
}

function row(update) {
  const known = (value, show) => value === null ? "" : show(value);
  const good = update.result === "committed" || update.result === "passed";
  const cells = [
    ["Time", new Date(1000 * update.ended).toLocaleTimeString([], { hour12: false })],
    ["Kind", update.kind], ["Version", update.version], ["Changed", known(update.changed_elements, count)],
    ["Sent", known(update.wire_bytes, bytes)], ["Pause", known(update.pause_ms, (ms) => ms.toFixed(ms < 10 ? 1 : 0) + " ms")],
    ["Took", known(update.seconds, (s) => s.toFixed(2) + " s")], ["Run", update.run_id || ""],
    ["Result", update.result + (update.message ? ": " + update.message : "")],
  ];
  const line = document.createElement("tr");
  for (const [label, value] of cells) {
    const cell = document.createElement("td");
    cell.textContent = String(value);
    cell.dataset.label = label;
    if (label === "Time") cell.title = new Date(1000 * update.ended).toISOString();
    if (label === "Result") cell.className = good ? "good" : "bad";
    line.append(cell);
  }
  if (seen !== null && !seen.has(JSON.stringify(update))) line.className = "fresh";
  return line;
}
function table(updates) {
  const now = new Set(updates.map((update) => JSON.stringify(update)));
  if (seen === null || now.size !== seen.size || [...now].some((key) => !seen.has(key))) {
    $("updates").replaceChildren(...updates.map(row));
    seen = now;
  }
  $("no-updates").hidden = updates.length > 0;
  $("updates-box").hidden = updates.length === 0;
}

function weights(status) {
  const found = status.weights, storage = Object.values(found.storage_bytes).reduce((a, b) => a + b, 0);
  text("version", found.version);
  text("digest", found.digest.slice(0, 12));
  $("digest").title = found.digest;
  text("run", found.run_id || "none");
  text("storage", bytes(storage));
  text("of-bf16", percent(storage / found.bf16_bytes) + " of " + bytes(found.bf16_bytes));
}
function load(status) {
  const found = status.load;
  text("running", count(found.running_sequences));
  text("waiting", count(found.waiting_sequences));
  text("active", count(found.active_sequences) + " of " + count(found.max_sequences));
  text("requests", count(found.active_requests));
  bar("load-bar", found.active_sequences / found.max_sequences);
  $("cache-card").hidden = found.kv_cache_usage === null;
  text("cache", percent(found.kv_cache_usage || 0));
  bar("cache-bar", found.kv_cache_usage);
  $("cache-facts").hidden = !found.kv_cache_tokens;
  text("cache-tokens", count(found.kv_cache_tokens));
  text("cache-dtype", found.kv_cache_dtype === "auto" ? "bf16" : found.kv_cache_dtype);
}
function memory(found) {
  text("engine-memory", found.engine_bytes ? bytes(found.engine_bytes) : "none");
  text("service-memory", bytes(found.service_bytes));
  $("device-box").hidden = !found.device_total_bytes;
  text("device", bytes(found.device_used_bytes || 0) + " of " + bytes(found.device_total_bytes || 0));
  bar("device-bar", found.device_used_bytes / found.device_total_bytes);
}
function precision(status) {
  const names = { int8: "INT8", fp8: "FP8", none: "bf16", "": "" };
  const parts = [names[status.quantization] || status.quantization];
  if (status.weights) {
    if (status.quantization !== "none") parts.push(percent(status.weights.quantized_share) + " of the weights in 8 bits");
    parts.push(status.weights.parameters.toLocaleString("en-US", { notation: "compact", maximumSignificantDigits: 3 }) + " parameters");
  }
  return parts.filter(Boolean).join(" · ");
}
function show(status) {
  phase(status.phase, status.reason, ["poisoned", "dead"].includes(status.phase));
  document.title = (status.weights ? "v" + status.weights.version + " · " : "") + status.phase + " · FlashRL rollout";
  text("model", status.model || "no name");
  text("precision", precision(status));
  text("rate", count(status.throughput.tokens_per_s));
  spark(status.throughput);
  if (status.weights) weights(status);
  if (status.load) load(status);
  memory(status.memory);
  table(status.updates);
  text("uptime", "Up for " + duration(status.uptime_s));
  text("asked", "As of " + new Date().toLocaleTimeString([], { hour12: false }));
  $("state").hidden = !status.weights;
  $("login").hidden = true;
  $("forget").hidden = !sessionStorage.getItem(KEY);
}
function phase(name, reason, bad) {
  text("phase", name);
  $("phase").dataset.phase = name;
  text("notice", reason || "");
  $("notice").hidden = !reason;
  $("notice").classList.toggle("bad", Boolean(bad));
}
function ask(message) {
  $("state").hidden = $("forget").hidden = true;
  text("model", " "); text("precision", ""); text("uptime", ""); text("asked", "");
  seen = null;
  document.title = "FlashRL rollout";
  phase("locked", message, true);
  if ($("login").hidden) { $("login").hidden = false; $("token").focus(); }
}

async function refresh() {
  const mine = ++turn, token = sessionStorage.getItem(KEY), headers = token ? { Authorization: "Bearer " + token } : {};
  try {
    const reply = await fetch("status", { headers, cache: "no-store", redirect: "error", signal: AbortSignal.timeout(LIMIT_MS) });
    if (mine !== turn) return;
    if (reply.status === 401) {
      sessionStorage.removeItem(KEY);
      ask(token ? "This is not the token of this service." : "");
      return;
    }
    if (!reply.ok) throw new Error("the service answered " + reply.status);
    const status = await reply.json();
    if (mine !== turn) return;
    show(status);
  } catch (error) {
    if (mine !== turn) return;
    phase("unreachable", "No answer from the service; what is shown may be old. Trying again.", true);
  }
  timer = setTimeout(refresh, EVERY_MS);
}
$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  const token = $("token").value.trim();
  $("token").value = "";
  clearTimeout(timer);
  if (!/^[\x20-\x7e]+$/.test(token)) { ask("This is not the token of this service."); return; }
  sessionStorage.setItem(KEY, token);
  refresh();
});
$("forget").addEventListener("click", () => {
  clearTimeout(timer);
  turn += 1;
  sessionStorage.removeItem(KEY);
  ask("");
});
refresh();
