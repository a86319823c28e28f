// The gallery of 05_select: one set of pictures, keys and orders for the page of its own (`page`) and for JupyterLab (`render`).
// Everything that a key does happens here at once; `host` is told of each change and keeps it.

function element(tag, name = "", text = "", ...inside) {
  const made = document.createElement(tag);
  if (name) made.className = `hk-${name}`;
  if (text) made.textContent = text;
  made.append(...inside);
  return made;
}
function button(name, text, does) {
  const made = element("button", name, text);
  made.type = "button";
  made.onclick = does;
  return made;
}
function stored(name, other) {
  try { return Object.assign(other, JSON.parse(localStorage.getItem(name) || "{}")); } catch (error) { return other; }
}
function store(name, held) {
  try { localStorage.setItem(name, JSON.stringify(held)); } catch (error) { /* a page from a file may have no store */ }
}

// given: {key, blind, reasons [text], scores [name], tiles [{id, label, and unless blind: status, why, scores, source, nearest}], pictures}
//   pictures: [address]; the first belong to the tiles in their order, source and nearest are numbers of others; gaps are filled later
// host: {state: {rater, verdicts {id: {verdict, reasons, rater, note}}, past}, changed(id, entry), buttons [element], news [element], keys: who hears them,
//   named: a name must be there first, full(number): address of the picture in all its pixels, renamed()}
// returns {filled(), say(text, bad)}
export function gallery(root, given, host) {
  const { tiles, pictures, blind } = given, state = host.state;
  let order = tiles.map((_, i) => i), at = 0, held = "", actual = false, just = null; // just: rejected by R and left, its why may follow
  const part = {};
  const put = (tag, name, text = "", ...inside) => (part[name] = element(tag, name, text, ...inside));
  const words = blind ? { keep: "taken for real", reject: "taken for made" } : { keep: "accepted", reject: "rejected" };

  // --- what is decided
  const here = () => order[at], tile = () => tiles[here()], verdict = id => state.verdicts[id] || null;
  function set(id, entry) {
    if (entry) state.verdicts[id] = entry; else delete state.verdicts[id];
    host.changed(id, entry);
    mark(id);
  }
  function nameless() {
    if (!host.named || state.rater.trim()) return false;
    say("Type your name first: it is written beside each verdict.", true);
    part.rater.focus();
    return true;
  }
  function judge(id, what, reasons) {
    state.past.push([id, verdict(id)]);
    set(id, { verdict: what, reasons, rater: state.rater.trim() });
  }
  function decide(what) {
    if (nameless()) return;
    const { id } = tile(), before = verdict(id);
    judge(id, what, what === "reject" && before ? before.reasons : []);
    just = what === "reject" ? id : null;
    const next = order.findIndex((i, k) => k > at && !verdict(tiles[i].id));
    at = next >= 0 ? next : Math.min(at + 1, order.length - 1);
    show();
  }
  function reason(k) {
    const name = given.reasons[k], id = just ?? tile().id; // R went on to the next tile: a number after it says why of the one rejected
    if (blind || !name || nameless()) return;
    const reasons = verdict(id)?.reasons ?? [];
    judge(id, "reject", reasons.includes(name) ? reasons.filter(one => one !== name) : [...reasons, name]);
    show();
  }
  function undo() {
    const last = nameless() ? null : state.past.pop();
    if (!last) return;
    set(...last);
    just = null;
    at = order.findIndex(i => tiles[i].id === last[0]);
    show();
  }

  // --- what is shown
  function mark(id) {
    const cell = cells.get(id), found = verdict(id);
    cell.classList.remove("hk-keep", "hk-reject");
    if (found) cell.classList.add(`hk-${found.verdict}`);
  }
  function big(i) {
    const number = held ? tile()[held] : i, shown = pictures[number] || "";
    const same = part.big.dataset.number === String(number) && part.big.dataset.actual === String(actual);
    if (same && part.big.getAttribute("src")) return;
    part.big.dataset.number = number;
    part.big.dataset.actual = actual;
    part.big.src = shown;
    part.big.hidden = !shown;
    if (actual && host.full) host.full(number).then(full => {
      if (actual && part.big.dataset.number === String(number)) part.big.src = full;
    });
  }
  function show() {
    const one = tile(), found = verdict(one.id);
    if (held && one[held] === undefined) held = "";
    big(here());
    part.stage.className = `hk-stage${found ? ` hk-${found.verdict}` : ""}${actual ? " hk-actual" : ""}`;
    part.label.textContent = one.label;
    const decision = one.status ? one.status + (one.why ? `: ${one.why}` : "") : "";
    part.why.textContent = held ? { nearest: "the nearest real tile", source: "its source" }[held] : decision;
    const note = found && (found.note || found.reasons.join(", "));
    const said = found ? words[found.verdict] + (found.rater ? ` by ${found.rater}` : "") + (note ? `: ${note}` : "") : "not decided";
    const asked = just && !blind ? verdict(just) : found, before = order.findIndex(i => tiles[i].id === just) + 1;
    const why = just && !blind && just !== one.id ? `. Tile ${before} was rejected, 1 to ${given.reasons.length} say why: ` : "";
    part.person.textContent = said + why + (why && (asked?.reasons.join(", ") || "not said"));
    for (const name of ["source", "nearest"]) {
      part[name].hidden = one[name] === undefined;
      part[name].firstChild.src = pictures[one[name]] || "";
    }
    part.scores.replaceChildren(...Object.entries(one.scores || {}).map(([name, value]) =>
      element("tr", "", "", element("td", "", name.replaceAll("_", " ")), element("td", "", String(value)))));
    [...part.reasons.children].forEach((each, k) => each.classList.toggle("hk-on", !!asked?.reasons.includes(given.reasons[k])));
    part.grid.querySelector(".hk-now")?.classList.remove("hk-now");
    const cell = cells.get(one.id), wall = part.grid;
    cell.classList.add("hk-now");
    if (cell.offsetTop < wall.scrollTop) wall.scrollTop = cell.offsetTop - 4;
    const below = cell.offsetTop + cell.offsetHeight - wall.clientHeight;
    if (below > wall.scrollTop) wall.scrollTop = below + 4;
    part.count.textContent = `tile ${at + 1} of ${order.length}, ${tiles.filter(any => verdict(any.id)).length} decided`;
    part.undo.disabled = !state.past.length;
  }
  function lay() { part.grid.replaceChildren(...order.map(i => cells.get(tiles[i].id))); }
  function sort() {
    const i = here(), by = part.sort.value, sign = by.startsWith("-") ? -1 : 1, name = by.replace(/^-/, "");
    const score = k => tiles[k].scores?.[name] ?? Infinity * sign; // a tile without this score comes last
    order = tiles.map((_, k) => k);
    if (name) order.sort((a, b) => sign * (score(a) - score(b)) || a - b);
    just = null;
    at = order.indexOf(i);
    lay(); show();
  }
  function say(text, bad = false) {
    part.said.textContent = text;
    part.said.classList.toggle("hk-bad", bad);
  }

  // --- keys
  const move = by => { just = null; at = Math.max(0, Math.min(order.length - 1, at + by)); show(); };
  const zoom = () => { actual = !actual; show(); };
  const hold = name => { held = name; show(); };
  const once = { a: () => decide("keep"), r: () => decide("reject"), u: undo, z: zoom };
  const again = { arrowright: () => move(1), arrowleft: () => move(-1), n: () => hold("nearest"), s: () => hold("source") };
  function pressed(event) {
    if (event.target === part.rater || event.target === part.sort || event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key.toLowerCase();
    const does = /^[1-9]$/.test(key) ? () => reason(Number(key) - 1) : once[key];
    if (!does && !again[key]) return;
    event.preventDefault();
    event.stopPropagation();
    if (does && !event.repeat) does();
    if (again[key] && !(event.repeat && "ns".includes(key))) again[key]();
  }
  const released = event => { if (held && "ns".includes(event.key.toLowerCase())) hold(""); };

  // --- the parts
  const keys = blind
    ? [["A", "I take it for real"], ["R", "I take it for made"], ["U", "undo"]]
    : [["A", "accept"], ["R", "reject"], [`1\u2013${given.reasons.length}`, "why"], ["U", "undo"],
      ["N", "held: nearest real tile"], ["S", "held: its source"]];
  const rater = put("input", "rater"), choose = put("select", "sort"), wall = put("div", "grid");
  put("div", "keys", blind ? "Some of these are real, some were made." : "");
  for (const [key, says] of [...keys, ["Z", "actual size"], ["\u2190 \u2192", "move"]]) {
    part.keys.append(element("span", "", "", element("kbd", "", key), ` ${says}`));
  }
  rater.autocomplete = "off"; rater.size = 14; rater.value = state.rater;
  rater.oninput = () => { state.rater = rater.value; host.changed(null); };
  rater.onchange = () => host.renamed?.();
  choose.setAttribute("aria-label", "order");
  choose.append(new Option("in order", ""));
  for (const name of given.scores) for (const [sign, way] of [["", "low"], ["-", "high"]]) {
    choose.append(new Option(`${name.replaceAll("_", " ")}, ${way} first`, sign + name));
  }
  choose.hidden = !given.scores.length;
  choose.onchange = () => { sort(); root.focus({ preventScroll: true }); };
  const cells = new Map(tiles.map((one, i) => {
    const cell = button("cell", "", () => { just = null; at = order.indexOf(i); show(); }), picture = new Image();
    picture.alt = ""; picture.decoding = "async";
    if (pictures[i]) picture.src = pictures[i];
    cell.dataset.id = one.id; cell.append(picture);
    return [one.id, cell];
  }));
  put("img", "big").alt = "the tile to judge";
  put("div", "reasons");
  if (!blind) part.reasons.append(...given.reasons.map((name, k) => button("", `${k + 1} ${name}`, () => reason(k))));
  part.undo = button("undo", "Undo (U)", undo);
  const accept = button("accept", blind ? "Real (A)" : "Accept (A)", () => decide("keep"));
  const refuse = button("refuse", blind ? "Made (R)" : "Reject (R)", () => decide("reject"));
  const line = element("div", "line", "", put("b", "label"), " ", put("span", "why"));
  const does = element("div", "does", "", accept, refuse, part.undo);
  put("div", "stage", "", element("div", "frame", "", part.big), line, put("div", "person"), does, part.reasons, put("table", "scores"));
  const beside = [["source", "made from"], ["nearest", "nearest real training tile"]].map(([name, says]) =>
    put("figure", name, "", new Image(), element("figcaption", "", says)));
  const news = element("div", "news", "", put("span", "said"), ...host.news);
  const bar = element("div", "bar", "", element("label", "", "Your name ", rater), choose, ...host.buttons, put("span", "count"), news);
  part.count.setAttribute("role", "status");
  root.replaceChildren(part.keys, bar, element("div", "main", "", part.stage, element("div", "side", "", ...beside), wall));
  root.onclick = event => { if (!event.target.closest("input, select")) root.focus({ preventScroll: true }); };
  root.onblur = () => { if (held) hold(""); };
  host.keys.addEventListener("keydown", pressed);
  host.keys.addEventListener("keyup", released);
  lay();
  tiles.forEach(one => mark(one.id));
  show();
  function filled() {
    tiles.forEach((one, i) => {
      const picture = cells.get(one.id).firstChild;
      if (pictures[i] && !picture.src) picture.src = pictures[i];
    });
    show();
  }
  function end() { host.keys.removeEventListener("keydown", pressed); host.keys.removeEventListener("keyup", released); }
  return { filled, say, end };
}

// --- a page of its own: decisions stay in this browser until they are exported

export function page(root, given) {
  root.tabIndex = -1;
  const name = `histokit-gallery-${given.key}`, state = stored(name, { rater: "", verdicts: {}, past: [] });
  function send() {
    const rater = state.rater.trim() || "unnamed", verdicts = Object.entries(state.verdicts).map(([id, found]) => ({ id, ...found }));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify({ gallery: given.key, rater, verdicts }, null, 1)], { type: "application/json" }));
    link.download = `verdicts-${given.key}-${rater.replace(/[^\w-]+/g, "_")}.json`;
    link.click();
  }
  gallery(root, given, { state, keys: document, buttons: [button("export", "Export", send)], news: [], changed: () => store(name, state) });
}

// --- in JupyterLab: each decision goes to the kernel, which writes it down and says so; what waits outlives a reload in the browser's store

const SLOW = 4000; // ms without an answer until the page says that the kernel is busy or gone

function render({ model, el }) {
  const me = Math.random().toString(36).slice(2), root = element("div", "gallery");
  root.textContent = "The gallery opens as soon as the kernel is free. If it does not, run this cell.";
  root.classList.add("hk-live");
  root.tabIndex = 0;
  root.dataset.lmSuppressShortcuts = "true"; // the notebook's own keys: A adds a cell, S saves, Z undoes
  el.append(root);
  const own = stored("histokit-reviewer", { rater: "" });
  let given = null, shown = null, state = null, held = null; // the deck on show, its view, its verdicts, what the browser's store had of it
  let waiting = [], sent = 0, late = null, asked = false; // rows not yet answered, those under way, the clock, "how did I do" is due
  let wanted = new Map(), addresses = []; // pictures in all their pixels, what is to be given back
  const ask = (what, facts = {}, to = given) => model.send({ ask: what, view: me, key: to?.key ?? "", ...facts });
  const whose = () => given.key + (given.blind ? ` ${own.rater.trim()}` : ""); // blind, everybody has verdicts of their own
  const keep = () => store(`histokit-desk-${given.desk}`, { waiting, past: { ...held.past, [whose()]: state.past } });

  // the first of these waits for a running cell (ipykernel answers a comm where it was last spoken to), what follows does not
  const open = blind => ask("open", { blind, rater: own.rater.trim() });
  function flush() {
    if (!sent && waiting.length) {
      sent = waiting.length;
      ask("save", { rows: waiting });
      clearTimeout(late);
      late = setTimeout(() => say("the kernel is busy or gone. They wait in this browser; after a restart run this cell again"), SLOW);
    }
    say();
  }
  function say(why = "") {
    const n = waiting.length;
    const rest = Object.keys(state.verdicts).length ? `saved in ${given.where}` : "";
    shown.say(n ? `not saved yet: ${n}${why ? `; ${why}` : ""}` : why || rest, !!why);
    more.hidden = !(why && !sent);
  }
  const more = button("more", "Try again", flush);
  more.hidden = true;
  const result = element("span", "result");

  function mount(found, verdicts) {
    shown?.end();
    addresses.forEach(URL.revokeObjectURL);
    addresses = []; wanted = new Map(); asked = false;
    given = { ...found, pictures: [] };
    held = stored(`histokit-desk-${given.desk}`, { waiting: [], past: {} });
    waiting = sent ? waiting : held.waiting;
    state = { rater: own.rater, verdicts, past: held.past[whose()] ?? [] };
    for (const row of waiting) if (row.key === given.key && (!given.blind || row.rater === own.rater.trim())) {
      if (row.verdict) verdicts[row.id] = row; else delete verdicts[row.id];
    }
    result.textContent = "";
    const other = button("other", given.blind ? "Back to scores and sources" : "Blind, among real tiles", () => open(!given.blind));
    const how = button("how", "How did I do?", () => { asked = true; score(); });
    const buttons = given.blind ? [other, how] : [other];
    const renamed = () => given.blind && open(true);
    shown = gallery(root, given, { state, buttons, news: [more, result], changed, named: true, keys: root, full, renamed });
    ask("pictures", { first: 0 });
    flush();
  }
  function changed(id, entry) {
    if (id === null) { own.rater = state.rater; store("histokit-reviewer", own); return; }
    const { verdict = "", reasons = [], note = "", rater = state.rater } = entry ?? {}; // no entry: it was taken back
    waiting.push({ key: given.key, blind: given.blind, id, verdict, reasons, note, rater: rater.trim() });
    keep();
    flush();
    if (given.blind && given.tiles.every(one => state.verdicts[one.id])) asked = true;
  }
  function score() {
    if (asked && !waiting.length) { asked = false; ask("score", { rater: own.rater.trim() }); }
  }
  function full(number) {
    if (!wanted.has(number)) {
      let done;
      wanted.set(number, Object.assign(new Promise(resolve => (done = resolve)), { done }));
      ask("full", { number });
    }
    return wanted.get(number);
  }
  function address(held, type) {
    addresses.push(URL.createObjectURL(new Blob([held], { type })));
    return addresses.at(-1);
  }

  const answers = {
    // an answer about somebody whose name has been changed since says nothing of who is here now; her own is under way
    open: said => { if (!said.given.blind || said.rater === own.rater.trim()) mount(said.given, said.verdicts); },
    pictures(said, buffers) {
      buffers.forEach((held, i) => (given.pictures[said.first + i] = address(held, "image/jpeg")));
      shown.filled();
      if (said.first + buffers.length < given.count) ask("pictures", { first: said.first + buffers.length });
    },
    full: (said, buffers) => wanted.get(said.number)?.done(address(buffers[0], "image/png")),
    save() {
      clearTimeout(late);
      waiting.splice(0, sent);
      sent = 0;
      keep(); flush(); score();
    },
    score: said => { result.textContent = said.text; },
  };
  function hear(said, buffers) {
    if (said.view !== me || (said.key && said.key !== given?.key && said.tell !== "open" && said.tell !== "save")) return;
    if (said.refused === undefined) return answers[said.tell](said, buffers);
    if (said.tell === "save") { clearTimeout(late); sent = 0; }
    if (shown) say(said.refused); else root.textContent = said.refused;
  }
  model.on("msg:custom", hear);

  // what is not the gallery's, such as Ctrl+S and Shift+Enter, goes on to the notebook
  root.addEventListener("keydown", event => {
    if (event.defaultPrevented || !(event.ctrlKey || event.metaKey || (event.shiftKey && event.key === "Enter"))) return;
    if (!el.dispatchEvent(new KeyboardEvent("keydown", event))) event.preventDefault();
  });
  open(false);
  return () => { shown?.end(); model.off("msg:custom", hear); clearTimeout(late); addresses.forEach(URL.revokeObjectURL); };
}

export default { render };
