"use strict";
/* Plays one film: see film/data.py for what is in it. `new Film(element, data)`; `close()` stops it. */
class Film {
  constructor(element, data) {
    this.data = data;
    this.element = element;
    this.playing = false;
    this.speed = 0.1;
    this.dots = new Map();
    element.replaceChildren();
    element.classList.add("film");
    if (data.partial) element.append(EEP.make("p", {class: "partial"}, `Not the whole of it: ${data.partial}`));
    if (!data.scenes.length) {
      element.append(EEP.make("p", {class: "story"}, "No rank was lost in what this log holds."));
      return;
    }
    this.build();
    this.show(0);
    this.frame = requestAnimationFrame(now => this.step(now));
    this.resized = new ResizeObserver(() => { this.dirty = true; });
    this.resized.observe(this.lanes.parentElement);
  }

  close() {
    cancelAnimationFrame(this.frame);
    this.resized?.disconnect();
    this.element.replaceChildren();
  }

  build() {
    const {make} = EEP;
    this.story = make("p", {class: "story"});
    this.play = make("button", {".onclick": () => this.toggle()}, "Pause");
    this.clock = make("span", {class: "clock"});
    const speeds = [["1", 1], ["1/4", .25], ["1/10", .1], ["1/40", .025]];
    this.speeds = speeds.map(([name, speed]) => make("button", {".onclick": () => this.setSpeed(speed)}, `${name} ×`));
    this.speeds.forEach((button, place) => { button.speed = speeds[place][1]; });
    this.views = [["The moment", "moment"], ["All of it", "all"]].map(([name, kind]) => {
      const button = make("button", {".onclick": () => this.setView(kind)}, name);
      button.kind = kind;
      return button;
    });
    this.stage = make("canvas", {"aria-label": "Ranks, and the streams that each of them has"});
    this.lanes = make("canvas", {tabindex: "0", "aria-label": "Time: ranks above, streams below"});
    this.marks = make("ol", {class: "marks"});
    const scenes = this.data.scenes.length < 2 ? null : make("select", {".onchange": event => this.show(+event.target.value)},
      ...this.data.scenes.map((scene, place) => make("option", {value: place},
        scene.losses.map(loss => `rank ${loss.rank}.${loss.incarnation}`).join(", "))));
    const bar = make("div", {class: "bar"}, ...(scenes ? [scenes] : []), this.play, ...this.speeds, this.clock,
      make("span", {class: "grow"}), ...this.views);
    const left = make("div", {},
      make("div", {class: "stage"}, this.stage),
      make("p", {class: "legend"}, "Each dot is a stream, in the box of the rank that computes it; it lights up with every " +
        "token its client gets. Below: states of ranks, then streams in their rank's colour, a tick a token; the longest " +
        "silence of each is marked."),
      make("div", {class: "lanes"}, this.lanes));
    this.element.append(this.story, bar, make("div", {class: "split"}, left, this.marks));
    const seek = event => {
      const box = this.lanes.getBoundingClientRect();
      this.seek(this.time(event.clientX - box.left));
    };
    this.lanes.addEventListener("pointerdown", event => {
      this.lanes.setPointerCapture(event.pointerId);
      this.pause();
      seek(event);
    });
    this.lanes.addEventListener("pointermove", event => { if (event.buttons) seek(event); });
    this.lanes.addEventListener("keydown", event => {
      const way = {ArrowLeft: -1, ArrowRight: 1}[event.key];
      if (way) this.seek(this.t + way * (this.b - this.a) / 100);
      if (event.key === " ") this.toggle();
      if (way || event.key === " ") event.preventDefault();
    });
    EEP.tooltip(this.lanes, (x, y) => this.say(x, y));
  }

  show(place) {
    const scene = this.scene = this.data.scenes[place];
    this.zero = scene.losses[0].at;
    this.dots.clear();
    this.streams = [...scene.streams].sort((a, b) =>
      b.moved - a.moved || b.silence.ms - a.silence.ms || a.id - b.id);
    this.ranks = scene.states.map(([rank]) => rank);
    this.tell();
    this.marks.replaceChildren(...scene.marks.map(mark => {
      const item = EEP.make("li", {}, EEP.make("time", {}, this.relative(mark[0])), EEP.make("span", {}, mark[3]));
      item.onclick = () => { this.pause(); this.seek(mark[0]); };
      return item;
    }));
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.setSpeed(scene.to - scene.from > 20000 ? .25 : .1);
    this.setView("moment");
    this.seek(calm ? this.zero : this.a);
    this.playing = !calm;
    this.play.textContent = this.playing ? "Pause" : "Play";
  }

  tell() {
    const {make, ms} = EEP;
    const moved = this.streams.filter(stream => stream.moved);
    const longest = Math.max(0, ...moved.map(stream => stream.silence.ms));
    const others = Math.max(0, ...this.streams.filter(stream => !stream.moved).map(stream => stream.silence.ms));
    const parts = this.scene.losses.flatMap((loss, place) => [place ? " " : "",
      make("b", {}, `Rank ${loss.rank}.${loss.incarnation}`), ` was lost${loss.cause ? ` (${loss.cause})` : ""}: ${loss.why}. `,
      make("span", {class: "cost"}, [
        loss.requests ? `${loss.requests} requests went on elsewhere` : "it had no requests",
        loss.stall === null ? null : `survivors stalled ${ms(loss.stall)}`,
        loss.back === null ? "it did not come back" : `back after ${ms(loss.back - loss.at)}`,
      ].filter(Boolean).join(" · ") + ".")]);
    const felt = [longest ? `its clients waited ${ms(longest)} at most` : null, others ? `others' ${ms(others)}` : null];
    if (felt.some(Boolean)) parts.push(` For a token, ${felt.filter(Boolean).join(", ")}.`);
    const left = this.scene.streams_left_out;
    if (left) parts.push(make("span", {class: "cost"}, ` ${left} more streams are not shown.`));
    this.story.replaceChildren(...parts);
  }

  relative(t) { return `${t < this.zero ? "−" : "+"}${EEP.ms(Math.abs(t - this.zero))}`; }
  time(x) { return this.a + (x - this.gutter) / Math.max(1, this.lanes.cssWidth - this.gutter - 10) * (this.b - this.a); }
  place(t) { return this.gutter + (t - this.a) / (this.b - this.a) * (this.lanes.cssWidth - this.gutter - 10); }

  setSpeed(speed) {
    this.speed = speed;
    for (const button of this.speeds) button.setAttribute("aria-pressed", button.speed === speed);
  }

  setView(kind) {
    const last = this.scene.losses.at(-1);
    const {from, to} = this.scene;
    this.a = from;
    this.b = to;
    if (kind === "moment") {
      const end = last.back === null ? last.at + 600 : last.back + 150;
      this.a = Math.max(from, this.zero - 150);
      this.b = Math.min(to, Math.max(end, this.a + 300), Math.max(this.zero + 1500, last.at + 600));
    }
    for (const button of this.views) button.setAttribute("aria-pressed", button.kind === kind);
    if (this.t < this.a || this.t > this.b) this.t = this.a;
    this.dirty = true;
  }

  seek(t) { this.t = Math.min(Math.max(t, this.a), this.b); this.dirty = true; }
  pause() { this.playing = false; this.play.textContent = "Play"; }
  toggle() {
    this.playing = !this.playing;
    if (this.playing && this.t >= this.b) this.t = this.a;
    this.play.textContent = this.playing ? "Pause" : "Play";
  }

  step(now) {
    const passed = Math.min(100, now - (this.before ?? now));
    this.before = now;
    if (this.playing) {
      this.t += passed * this.speed;
      if (this.t >= this.b) { this.t = this.b; this.pause(); }
      this.dirty = true;
    }
    if (this.dirty || this.moving) {
      this.dirty = false;
      this.drawStage(passed);
      this.drawLanes();
      this.clock.textContent = this.relative(this.t);
      [...this.marks.children].forEach((item, place) => {
        const past = this.scene.marks[place][0] <= this.t;
        const next = this.scene.marks[place + 1];
        item.className = past ? (!next || next[0] > this.t ? "past now" : "past") : "";
      });
      const current = this.marks.querySelector(".now");
      if (current && this.playing) {
        const top = current.offsetTop - this.marks.offsetTop - this.marks.clientHeight / 2;
        if (Math.abs(this.marks.scrollTop - top) > this.marks.clientHeight / 3) this.marks.scrollTop = top;
      }
    }
    this.frame = requestAnimationFrame(then => this.step(then));
  }

  /** The last of `moves` (time first) at or before `t`. */
  static last(moves, t) {
    let low = 0, high = moves.length;
    while (low < high) { const mid = (low + high) >> 1; if (moves[mid][0] <= t) low = mid + 1; else high = mid; }
    return low ? moves[low - 1] : null;
  }

  static lastTime(times, t) {
    let low = 0, high = times.length;
    while (low < high) { const mid = (low + high) >> 1; if (times[mid] <= t) low = mid + 1; else high = mid; }
    return low ? times[low - 1] : null;
  }

  /** Ranks that get a box: all, or with hundreds those that something happens to. */
  boxes() {
    if (this.scene.states.length <= 32) return this.scene.states;
    const touched = new Set(this.streams.flatMap(stream => stream.owners.map(owner => owner[1])));
    for (const loss of this.scene.losses) touched.add(loss.rank);
    return this.scene.states.filter(([rank]) => touched.has(rank)).slice(0, 64);
  }

  drawStage(passed) {
    const states = this.boxes();
    const wide = this.stage.parentElement.clientWidth;
    const columns = Math.min(states.length, Math.max(1, Math.floor(wide / (states.length > 16 ? 84 : 120))));
    const rows = Math.ceil(states.length / columns);
    const tall = rows > 2 ? 78 : 118;
    const {context, width} = EEP.fit(this.stage, rows * tall + 46);
    const cell = width / columns;
    const homes = new Map([[-1, {x: width / 2 - 60, y: 6, w: 120, h: 30, n: 0}]]);
    context.font = "600 12px " + EEP.color("sans");
    context.textBaseline = "middle";
    states.forEach(([rank, moves], place) => {
      const x = (place % columns) * cell + 6, y = 42 + Math.floor(place / columns) * tall;
      const move = Film.last(moves, this.t);
      const state = move ? move[2] : "Launching", shade = EEP.color(state);
      const box = {x: x + 6, y: y + 24, w: cell - 24, h: tall - 34, n: 0};
      homes.set(rank, box);
      const since = move ? this.t - move[0] : 1e9;
      context.globalAlpha = state === "Failed" ? .28 : state === "Serving" ? .12 : .16;
      context.fillStyle = shade;
      context.beginPath(); context.roundRect(x, y, cell - 12, tall - 8, 8); context.fill();
      context.globalAlpha = 1;
      context.lineWidth = since < 60 ? 2.5 : 1;
      context.strokeStyle = shade;
      context.stroke();
      context.fillStyle = EEP.color("text");
      context.textAlign = "left";
      context.fillText(`${rank}.${move ? move[1] : "?"}`, x + 9, y + 13);
      context.textAlign = "right";
      context.fillStyle = shade;
      if (cell > 96) context.fillText(state, x + cell - 20, y + 13);
    });
    context.textAlign = "center";
    context.fillStyle = EEP.color("faint");
    const alive = this.streams.filter(stream => stream.from <= this.t && (stream.to === null || stream.to > this.t - 40));
    const counts = new Map();
    for (const stream of alive) {
      const owner = Film.last(stream.owners, this.t);
      stream.home = owner && homes.has(owner[1]) ? owner[1] : -1;
      counts.set(stream.home, (counts.get(stream.home) || 0) + 1);
    }
    if (!counts.get(-1)) context.fillText("router", width / 2, 21);
    this.moving = false;
    const share = 1 - Math.exp(-passed / 90);
    for (const stream of alive) {
      const home = homes.get(stream.home);
      const size = Math.min(24, Math.sqrt(home.w * home.h / Math.max(1, counts.get(stream.home))));
      const per = Math.max(1, Math.floor(home.w / size));
      const slot = home.n++;
      const x = home.x + (slot % per) * size + size / 2, y = home.y + Math.floor(slot / per) * size + size / 2;
      const dot = this.dots.get(stream.id) || {x, y};
      this.dots.set(stream.id, dot);
      dot.x += (x - dot.x) * share;
      dot.y += (y - dot.y) * share;
      const away = Math.abs(x - dot.x) + Math.abs(y - dot.y);
      if (away > .5) this.moving = true;
      const token = Film.lastTime(stream.tokens, this.t);
      const age = this.t - (token ?? stream.from), usual = stream.silence.usual || 30;
      const glow = token === null ? 0 : Math.max(0, 1 - age / (usual * 1.3));
      const silent = age > usual * 3;
            context.globalAlpha = silent ? 1 : .38 + .62 * glow;
      context.fillStyle = silent ? EEP.color("Failed") : EEP.rankColor(stream.owners[0][1] < 0 && stream.owners[1] ? stream.owners[1][1] : stream.owners[0][1]);
      context.beginPath(); context.arc(dot.x, dot.y, size * (away > 2 ? .42 : .3 + .08 * glow), 0, 7); context.fill();
      if (stream.moved) { context.globalAlpha = 1; context.lineWidth = 1; context.strokeStyle = EEP.color("text"); context.stroke(); }
    }
    context.globalAlpha = 1;
  }

  layout() {
    const lanes = this.boxes();
    const lane = lanes.length > 16 ? 9 : 15;
    const shown = this.streams.slice(0, 80);
    const row = shown.length > 40 ? 7 : 10;
    return {lanes, lane, shown, row, top: 24, below: 24 + lanes.length * lane + 14};
  }

  drawLanes() {
    const {lanes, lane, shown, row, top, below} = this.layout();
    this.gutter = 52;
    const {context, width, height} = EEP.fit(this.lanes, below + shown.length * row + 10);
    const right = width - 10;
    context.save();
    context.font = "11px " + EEP.color("mono");
    context.textBaseline = "middle";
    context.textAlign = "center";
    for (const [, t] of EEP.ticks(this.a - this.zero, this.b - this.zero, right - this.gutter)) {
      const x = this.place(t + this.zero);
      context.fillStyle = EEP.color("line");
      context.fillRect(x, 18, 1, height);
      context.fillStyle = EEP.color("dim");
      context.fillText(t === 0 ? "0" : EEP.ms(t), x, 10);
    }
    context.textAlign = "right";
    context.fillStyle = EEP.color("dim");
    lanes.forEach(([rank], place) => { if (lane > 10 || place % 4 === 0) context.fillText(`rank ${rank}`, this.gutter - 8, top + place * lane + lane / 2); });
    context.beginPath(); context.rect(this.gutter, 0, right - this.gutter, height); context.clip();
    lanes.forEach(([rank, moves], place) => {
      const y = top + place * lane;
      moves.forEach((move, number) => {
        const x = this.place(Math.max(move[0], this.a)), next = moves[number + 1];
        const end = this.place(Math.min(next ? next[0] : this.b, this.b));
        context.globalAlpha = move[2] === "Serving" ? .6 : 1;  // what is as it should be stays behind what is not
        context.fillStyle = EEP.color(move[2]);
        context.fillRect(x, y + 1, Math.max(end - x, move[2] === "Failed" ? 3 : .6), lane - 3);
        context.globalAlpha = 1;
      });
      for (const mark of this.scene.marks) {
        if (mark[2] !== rank || mark[1] !== "mask") continue;
        const x = this.place(mark[0]);
        context.fillStyle = EEP.color("text");
        context.beginPath(); context.moveTo(x, y + 1); context.lineTo(x - 3, y + lane - 3); context.lineTo(x + 3, y + lane - 3); context.fill();
      }
    });
    shown.forEach((stream, place) => {
      const y = below + place * row;
      const end = stream.to ?? this.b;
      stream.owners.forEach((owner, number) => {
        const next = stream.owners[number + 1];
        const x = this.place(Math.max(owner[0], this.a)), stop = this.place(Math.min(next ? next[0] : end, end));
        context.globalAlpha = owner[1] < 0 ? .25 : .4;
        context.fillStyle = EEP.rankColor(owner[1]);
        context.fillRect(x, y + row / 2 - 1, Math.max(0, stop - x), 2);
      });
      context.globalAlpha = .22;
      context.fillStyle = EEP.color("Failed");
      const {silence} = stream;
      if (silence.ms > silence.usual * 2) context.fillRect(this.place(silence.from), y + 1, this.place(silence.from + silence.ms) - this.place(silence.from), row - 2);
      context.globalAlpha = 1;
      let owner = 0;
      for (const token of stream.tokens) {
        while (stream.owners[owner + 1] && stream.owners[owner + 1][0] <= token) owner++;
        context.fillStyle = EEP.rankColor(stream.owners[owner] ? stream.owners[owner][1] : -1);
        context.fillRect(this.place(token) - .75, y + 1, 1.5, row - 2);
      }
      if (row >= 9 && silence.ms > silence.usual * 2) {
        const x = this.place(silence.from + silence.ms / 2), words = EEP.ms(silence.ms);
        if (this.place(silence.from + silence.ms) - this.place(silence.from) > words.length * 7) {
          context.textAlign = "center";
          context.fillStyle = EEP.color("text");
          context.font = "9px " + EEP.color("mono");
          context.fillText(words, x, y + row / 2);
        }
      }
    });
    for (const loss of this.scene.losses) {
      context.fillStyle = EEP.color("Failed");
      context.fillRect(this.place(loss.at) - .5, 18, 1, height);
    }
    const x = this.place(this.t);
    context.fillStyle = EEP.color("accent");
    context.fillRect(x - 1, 14, 2, height);
    context.beginPath(); context.moveTo(x - 6, 14); context.lineTo(x + 6, 14); context.lineTo(x, 22); context.fill();
    context.restore();
  }

  say(x, y) {
    const {lanes, lane, shown, row, top, below} = this.layout();
    if (x < this.gutter) return null;
    const t = this.time(x);
    if (y >= top && y < top + lanes.length * lane) {
      const [rank, moves] = lanes[Math.floor((y - top) / lane)];
      const move = Film.last(moves, t);
      return `${this.relative(t)}\nrank ${rank}${move ? `.${move[1]}: ${move[2]}` : ""}`;
    }
    const stream = shown[Math.floor((y - below) / row)];
    if (!stream || y < below) return this.relative(t);
    const owner = Film.last(stream.owners, t);
    return `${this.relative(t)}\nstream ${stream.id}, ${owner && owner[1] >= 0 ? `on rank ${owner[1]}` : "on no rank"}\n` +
      `longest silence ${EEP.ms(stream.silence.ms)}, usually ${EEP.ms(stream.silence.usual)}`;
  }
}
