"use strict";
/* The live page: hears the feed (see gateway/page/feed.py) and shows what it says. All URLs are relative. */
(() => {
  const {make, color, ms, count} = EEP;
  const byId = id => document.getElementById(id);
  const state = {about: null, group: null, ranks: new Map(), moves: new Map(), losses: [], lastMove: 0, samples: [], skew: 0, stoppedAt: null};
  const ROW = ["id", "incarnation", "state", "status", "running", "waiting", "device", "held", "named", "shelf", "shelf_bytes"];
  const LOSS = ["rank", "incarnation", "at", "at_ns", "state", "cause", "why", "requests", "heirs", "stall", "back"];
  const KEPT_SAMPLES = 1800, KEPT_MOVES = 4096;
  const named = (names, values) => Object.fromEntries(names.map((name, place) => [name, values[place]]));
  const QUIET_MS = 1800;  // a frame comes twice a second
  const GIVEN_UP_MS = 6000, LONGEST_PAUSE_MS = 2000;
  /** The server's time; where its last frame was when the page is no longer up to date. */
  const serverNow = () => state.stoppedAt ?? Date.now() + state.skew;

  const timeline = new Timeline(byId("timeline"), state);
  const lifecycle = new Lifecycle(byId("lifecycle"), state);
  const experts = new Experts(byId("experts"), state);
  const pages = new Pages(byId("pages"), state);
  const pictures = [timeline, lifecycle, experts, pages];

  // What the server says

  function take(frame) {
    if (frame.snapshot) begin(frame);
    state.heardAt = frame.now_ms;
    state.skew = frame.now_ms - Date.now();
    state.stoppedAt = null;
    if (frame.group) state.group = frame.group;
    const before = state.ranks.size;
    for (const row of frame.ranks || []) {
      if (row.length === 1) state.ranks.delete(row[0]);
      else state.ranks.set(row[0], named(ROW, row));
    }
    for (const move of frame.moves || []) moved(move, frame.snapshot);
    if (frame.losses) tellLosses(frame.losses.map(loss => named(LOSS, loss)), frame.snapshot);
    if (frame.samples) {
      state.samples.push(...frame.samples);
      state.samples.splice(0, Math.max(0, state.samples.length - KEPT_SAMPLES));
    }
    // Each is drawn anew for what it shows, and no oftener: with hundreds of ranks some number changes in every frame.
    const sampled = Boolean(frame.snapshot || frame.samples);
    if (frame.snapshot || frame.moves || state.ranks.size !== before) experts.dirty = lifecycle.dirty = timeline.dirty = true;
    if (frame.ranks) state.pagesChanged = true;
    if (sampled && state.pagesChanged) { pages.dirty = true; state.pagesChanged = false; }
    tell();
    if (sampled || frame.losses) plots.forEach(plot => plot.update());
    if (layerKey() !== experts.key) fetchLayer();
    operator.tell();
  }

  function begin(frame) {
    if (state.about?.run !== frame.about.run) {  // nothing of another run is shown as this one's
      experts.layer = null;
      state.losses = [];
      state.cpu = state.busy = undefined;
    }
    state.about = frame.about;
    state.ranks.clear();
    state.moves.clear();
    state.samples.length = 0;
    state.lastMove = 0;
    lifecycle.reset();
    experts.key = null;
    byId("model").textContent = `${frame.about.model} · ${frame.about.version}`;
    document.title = `${frame.about.model} · elastic_ep`;
    byId("lossnote").textContent = frame.about.films ? "click one for its film" : "no films: this run writes no event log";
    byId("legend").replaceChildren(...frame.about.states.flatMap(name => {
      const swatch = make("i");
      swatch.style.background = color(name);
      return [swatch, name];
    }));
    const key = [["accent", 1, "held by requests"], ["accent", .38, "may be shared"], ["Joining", 1, "shelf, of the fullest"]];
    byId("pageskey").replaceChildren(...key.flatMap(([name, alpha, words]) => {
      const swatch = make("i");
      swatch.style.background = color(name);
      swatch.style.opacity = alpha;
      return [swatch, words];
    }));
    operator.offer();
  }

  function moved([number, t, rank, incarnation, to], quiet) {
    if (number <= state.lastMove) return;  // a snapshot may have told it already
    state.lastMove = number;
    if (!state.moves.has(rank)) state.moves.set(rank, []);
    const moves = state.moves.get(rank);
    moves.push({t, incarnation, state: to});
    if (moves.length > KEPT_MOVES) moves.shift();
    if (!quiet && rank >= 0) lifecycle.moved(rank, to);
  }

  // Numbers and words

  const tiles = new Map();
  function tile(name, value, unit = "", mood = "") {
    let found = tiles.get(name);
    if (!found) {
      found = {box: make("div", {class: "tile"}), value: make("b"), unit: make("small")};
      found.box.append(make("span", {}, name), found.value, found.unit);
      byId("tiles").append(found.box);
      tiles.set(name, found);
    }
    if (found.value.textContent !== String(value)) found.value.textContent = value;
    if (found.unit.textContent !== unit) found.unit.textContent = unit;
    found.box.className = `tile ${mood}`;
  }

  function tell() {
    const {group, ranks, samples, about} = state;
    const serving = [...ranks.values()].filter(row => about.seated.includes(row.state)).length;
    const badge = byId("group");
    const stale = state.stoppedAt !== null;
    badge.textContent = stale ? "unknown" : group.idle && group.state === "Serving" ? "Serving, idle" : group.state;
    badge.style.color = color(stale ? "dim" : group.state);
    const last = samples.at(-1), recent = samples.slice(-20);
    const gap = Math.max(0, ...recent.map(sample => sample[2]));
    const held = [...ranks.values()].reduce((sum, row) => sum + row.held, 0);
    const room = [...ranks.values()].reduce((sum, row) => sum + row.device, 0);
    tile("ranks that serve", `${serving}`, `of ${ranks.size}`, serving === ranks.size ? "" : serving ? "warn" : "bad");
    tile("more may be lost", Math.max(0, group.tolerates), "", group.tolerates < 0 ? "bad" : group.tolerates < 1 ? "warn" : "");
    tile("tokens a second", last ? count(Math.round(last[1])) : "–");
    tile("longest gap, 10 s", gap ? ms(gap) : "–");
    tile("requests", group.running, group.waiting ? `+ ${group.waiting} waiting` : "running");
    tile("KV cache held", room ? `${(held / room * 100).toFixed(held / room < .1 ? 1 : 0)}` : "–", "%");
    tile("losses", state.losses.length, state.losses.length ? `last ${ago(state.losses.at(-1).at)}` : "");
    tile("step", count(group.step), `view ${group.epoch}`);
    const [name, cores, load, cpu] = group.host;
    const before = state.cpu, now = performance.now();
    if (!before || now - before[1] > 3000) {
      if (before) state.busy = `${Math.max(0, (cpu - before[0]) / (now - before[1]) * 1e5).toFixed(0)} %`;
      state.cpu = [cpu, now];
    }
    byId("host").textContent = `${name}: ${cores} cores, load ${load}${state.busy ? `, run process ${state.busy} of one` : ""}`;
    const layer = experts.layer;
    byId("copies").textContent = layer ? `layer ${layer.layer}, placement ${layer.version}, at least ${Math.min(...layer.least)} copies anywhere` : "";
  }

  function ago(t) {
    const passed = Math.max(0, serverNow() - t);
    return passed < 60000 ? `${Math.round(passed / 1000)} s ago` : passed < 5400000 ? `${Math.round(passed / 60000)} min ago` : new Date(t).toLocaleTimeString();
  }

  function tellLosses(losses, quiet) {
    const known = new Set(state.losses.map(loss => `${loss.rank}.${loss.incarnation}`));
    state.losses = losses;
    const body = byId("losses").tBodies[0];
    if (!losses.length) {
      body.replaceChildren(make("tr", {}, make("td", {colspan: 10, class: "none"}, "No rank has been lost.")));
      return;
    }
    body.replaceChildren(...[...losses].reverse().map(loss => {
      const name = `${loss.rank}.${loss.incarnation}`, films = state.about.films;
      const row = make("tr", {class: [films ? "filmed" : "", quiet || known.has(name) ? "" : "fresh"].join(" "), "data-loss": name},
        make("td", {}, new Date(loss.at).toLocaleTimeString()), make("td", {}, name), make("td", {}, loss.state),
        make("td", {class: "cause"}, loss.cause || "…"), make("td", {class: "why"}, loss.why),
        make("td", {class: "n"}, `${loss.requests}`), make("td", {}, loss.heirs),
        make("td", {class: "n"}, loss.stall === null ? "–" : ms(loss.stall * 1000)),
        make("td", {class: "n"}, loss.back === null ? "away" : ms(loss.back * 1000)),
        make("td", {class: "n"}, films ? make("button", {}, "Film") : ""));
      if (films) row.onclick = () => showFilm(loss);
      return row;
    }));
  }

  // Plots

  class Plot {
    constructor(element, series, log) {
      const axis = {stroke: () => color("dim"), grid: {stroke: () => color("line"), width: 1}, ticks: {show: false}, font: "11px system-ui", size: 46};
      const mark = chart => {
        const {ctx, bbox} = chart;
        ctx.save();
        ctx.fillStyle = color("Failed");
        ctx.globalAlpha = .6;
        for (const loss of state.losses) {
          const x = chart.valToPos(loss.at / 1000, "x", true);
          if (x >= bbox.left && x <= bbox.left + bbox.width) ctx.fillRect(x, bbox.top, devicePixelRatio, bbox.height);
        }
        ctx.restore();
      };
      this.element = element;
      this.chart = new uPlot({
        width: element.clientWidth || 300, height: 170, padding: [8, 10, 0, 0], cursor: {show: true, points: {size: 5}, drag: {x: false, y: false}}, legend: {show: false},
        scales: {x: {time: true, range: () => [(serverNow() - timeline.span) / 1000, serverNow() / 1000]},
          y: log ? {distr: 3, range: (_, low, high) => [Math.max(1, Math.min(10, low || 10)), Math.max(200, high || 200) * 1.3]} : {range: (_, low, high) => [0, Math.max(1, high || 1) * 1.12]}},
        axes: [{...axis, size: 26, splits: (chart, _, low, high) => EEP.clockTicks(-timeline.span, 0, chart.bbox.width / devicePixelRatio, 70)
          .map(([, ago]) => high + ago / 1000), values: (chart, splits) => splits.map(value => EEP.clock((value - chart.scales.x.max) * 1000))}, {...axis, values: (_, values) => values.map(value => value === null ? "" : count(value)), space: 28}],
        series: [{}, ...series.map(([name, fill]) => ({
          label: name, stroke: () => color(fill), width: 1.5, points: {show: false}, fill: () => `color-mix(in srgb, ${color(fill)} 14%, transparent)`,
        }))],
        hooks: {draw: [mark]},
      }, [[], ...series.map(() => [])], element);
      this.columns = series.map(([, , column]) => column);
      EEP.tooltip(this.chart.over, () => {
        const place = this.chart.cursor.idx;
        return place === null || place === undefined ? null : [new Date(this.chart.data[0][place] * 1000).toLocaleTimeString(),
          ...series.map(([name], number) => `${name}: ${this.chart.data[number + 1][place] ?? "–"}`)].join("\n");
      });
    }

    update() {
      const since = serverNow() - timeline.span - 2000;
      let first = state.samples.length;
      while (first > 0 && state.samples[first - 1][0] >= since) first--;
      const shown = state.samples.slice(first);
      const width = this.element.clientWidth;
      if (width !== this.chart.width) this.chart.setSize({width, height: 170});
      this.chart.setData([shown.map(sample => sample[0] / 1000), ...this.columns.map(column => shown.map(sample => column(sample)))]);
    }
  }
  const plots = [
    new Plot(byId("tokens"), [["tokens a second", "Serving", sample => sample[1]]]),
    new Plot(byId("gaps"), [["longest gap, ms", "Draining", sample => sample[2] > 0 ? Math.max(1, sample[2]) : null]], true),
    new Plot(byId("requests"), [["running", "accent", sample => sample[3]], ["waiting", "Joining", sample => sample[4]]]),
  ];

  // Asking

  const keys = {
    get: name => sessionStorage.getItem(name), set: (name, value) => sessionStorage.setItem(name, value),
    remove: name => sessionStorage.removeItem(name),
  };
  const headers = name => (keys.get(name) ? {Authorization: `Bearer ${keys.get(name)}`} : {});

  /** Ask for the key of that name; resolves when one was given. */
  function askKey(name, words) {
    const dialog = byId("ask");
    byId("askwhat").textContent = words;
    byId("key").value = "";
    if (!dialog.open) dialog.showModal();
    return new Promise(resolve => {
      byId("askform").onsubmit = event => {
        event.preventDefault();
        keys.set(name, byId("key").value);
        dialog.close();
        resolve(true);
      };
      dialog.onclose = () => resolve(false);
    });
  }

  /** The answer as JSON. Throws an Error with the server's own words. */
  async function ask(path, options = {}, key = "api-key") {
    const response = await fetch(path, {...options, headers: {...headers(key), ...options.headers}, cache: "no-store"});
    const body = await response.json().catch(() => null);
    if (!response.ok) throw Object.assign(new Error(body?.error?.message || `status ${response.status}`), {status: response.status});
    return body;
  }

  /** What a layer's picture depends on: the placement, who takes part, and which one is looked at. */
  const layerKey = () => `${state.group?.placement} ${state.group?.epoch} ${experts.chosen}`;
  let layerAsked = false;
  async function fetchLayer() {
    if (layerAsked) return;
    layerAsked = true;
    const key = layerKey();
    try {
      experts.layer = await ask(`page/layer/${experts.chosen}`);
      experts.key = key;
      experts.dirty = true;
      if (state.group) tell();
    } catch (error) {
      console.warn("no placement:", error.message);
    }
    setTimeout(() => {
      layerAsked = false;
      if (experts.key && experts.key !== layerKey()) fetchLayer();
    }, 500);
  }
  experts.wanted = fetchLayer;

  let film = null;
  async function showFilm(loss) {
    const dialog = byId("film"), screen = byId("screen");
    screen.className = "film";
    screen.replaceChildren(make("p", {class: "story"}, `Reading the log for rank ${loss.rank}.${loss.incarnation} …`));
    if (!dialog.open) dialog.showModal();
    try {
      const data = await ask(`page/film/${loss.rank}/${loss.incarnation}`);
      film?.close();
      film = new Film(screen, data);
    } catch (error) {
      screen.replaceChildren(make("p", {class: "story"}, `There is no film: ${error.message}`));
    }
  }
  byId("film").addEventListener("close", () => { film?.close(); film = null; });

  const operator = new Operator(state, ask, keys);
  for (const picture of [timeline, lifecycle]) {
    picture.canvas.addEventListener("click", event => {
      const box = picture.canvas.getBoundingClientRect(), rank = picture.rankAt(event.clientX - box.left, event.clientY - box.top);
      if (rank !== null) operator.show(rank);
    });
  }

  // The feed, by fetch: an EventSource cannot send a key

  /** Whether the page is up to date. What is not stays as it was, dimmed, and time stands still in it. */
  function link(up, words) {
    const element = byId("link");
    element.className = `link ${up ? "up" : "down"}`;
    element.textContent = words;
    operator.up = up;
    const stale = !up && state.group !== null;
    document.body.classList.toggle("stale", stale);
    byId("stale").hidden = !stale;
    if (!stale || state.stoppedAt !== null) return;
    state.stoppedAt = state.heardAt;
    byId("stale").textContent = `Not up to date: what is shown is how it was at ${new Date(state.stoppedAt).toLocaleTimeString()}, when the server was last heard.`;
    tell();
    timeline.dirty = true;
    plots.forEach(plot => plot.update());
  }

  async function follow() {
    const stop = new AbortController();
    let quiet, given_up = setTimeout(() => stop.abort(), GIVEN_UP_MS);
    const response = await fetch("page/feed", {headers: headers("api-key"), signal: stop.signal, cache: "no-store"});
    if (response.status === 401) {
      clearTimeout(given_up);
      link(false, "needs a key");
      await askKey("api-key", "This server's API key");
      return;
    }
    if (!response.ok) throw new Error((await response.json().catch(() => null))?.error?.message || `status ${response.status}`);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    try {
      for (;;) {
        const {value, done} = await reader.read();
        if (done) return;
        const events = (rest + value).split("\n\n");
        rest = events.pop();
        if (!events.length) continue;
        clearTimeout(quiet);
        clearTimeout(given_up);
        quiet = setTimeout(() => link(false, "no news"), QUIET_MS);
        given_up = setTimeout(() => stop.abort(), GIVEN_UP_MS);
        for (const event of events) {
          const data = event.split("\n").filter(line => line.startsWith("data: ")).map(line => line.slice(6)).join("\n");
          if (data) take(JSON.parse(data));
        }
        link(true, "live");
      }
    } finally {
      clearTimeout(quiet);
      clearTimeout(given_up);
      stop.abort();
    }
  }

  async function connect() {
    for (let tries = 0; ; tries++) {
      const began = performance.now();
      try {
        await follow();
      } catch (error) {
        link(false, `offline: ${error.name === "AbortError" ? "no answer" : error.message}`);
      }
      if (performance.now() - began > 5000) tries = 0;
      if (byId("link").classList.contains("up")) link(false, "offline: the server has ended");
      await new Promise(resolve => setTimeout(resolve, Math.min(LONGEST_PAUSE_MS, 250 * 2 ** tries)));
    }
  }

  byId("span").onchange = event => {
    timeline.span = +event.target.value;
    timeline.dirty = true;
    plots.forEach(plot => plot.update());
  };
  new ResizeObserver(() => { pictures.forEach(picture => { picture.dirty = true; }); }).observe(document.body);
  matchMedia("(prefers-color-scheme: light)").addEventListener("change", () => pictures.forEach(picture => { picture.dirty = true; }));

  let before = performance.now();
  function frame(now) {
    const passed = Math.min(100, now - before);
    before = now;
    for (const picture of pictures) picture.draw(serverNow(), passed);
    requestAnimationFrame(frame);
  }
  requestAnimationFrame(frame);
  connect();
})();
