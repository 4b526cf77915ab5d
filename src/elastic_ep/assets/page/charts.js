"use strict";
/* The page's own pictures, on canvases: each has `dirty` and `draw(now, passed)`, and draws what is in `state`. */

/** The last of `moves` ({t, ...}, oldest first) at or before `t`. */
function lastMove(moves, t) {
  let low = 0, high = moves.length;
  while (low < high) { const mid = (low + high) >> 1; if (moves[mid].t <= t) low = mid + 1; else high = mid; }
  return low ? moves[low - 1] : null;
}

class Timeline {
  constructor(canvas, state) {
    Object.assign(this, {canvas, state, span: 120000, dirty: true, gutter: 58, top: 20, drawnAt: 0});
    EEP.tooltip(canvas, (x, y) => this.say(x, y));
  }

  rows() {
    const {about, ranks} = this.state;
    return [about.group, about.host, ...[...ranks.keys()].sort((a, b) => a - b)];
  }

  sizes(count) {
    const lane = count <= 20 ? 15 : count <= 40 ? 10 : Math.max(1.5, Math.min(8, 340 / count));
    return {lane, place: number => this.top + (number < 2 ? number * 15 : 30 + 6 + (number - 2) * lane)};
  }

  draw(now) {
    const {state} = this;
    if (!state.about) return;
    // A pixel further, or something new: else there is nothing to draw.
    const perPixel = this.span / Math.max(1, (this.canvas.cssWidth || 1000) - this.gutter);
    if (!this.dirty && now - this.drawnAt < perPixel) return;
    this.dirty = false;
    this.drawnAt = now;
    const rows = this.rows(), {lane, place} = this.sizes(rows.length - 2);
    const {context, width, height} = EEP.fit(this.canvas, Math.ceil(place(rows.length) + 6));
    const end = now, begin = now - this.span, right = width - 4;
    const at = t => this.gutter + (t - begin) / this.span * (right - this.gutter);
    Object.assign(this, {begin, end, right});
    context.font = "11px " + EEP.color("sans");
    context.textBaseline = "middle";
    context.textAlign = "center";
    for (const [, ago] of EEP.clockTicks(-this.span, 0, right - this.gutter, 100)) {
      const x = at(end + ago);
      context.fillStyle = EEP.color("line");
      context.fillRect(x, 16, 1, height - 20);
      context.fillStyle = EEP.color("dim");
      if (x < right - 14) context.fillText(EEP.clock(ago), x, 8);
    }
    context.textAlign = "right";
    context.fillStyle = EEP.color("dim");
    const every = lane >= 9 ? 1 : Math.ceil(14 / lane);
    rows.forEach((rank, number) => {
      const tall = number < 2 ? 13 : lane;
      const name = number === 0 ? "group" : number === 1 ? "host" : (number - 2) % every ? null : `rank ${rank}`;
      if (name) context.fillText(name, this.gutter - 8, place(number) + tall / 2);
    });
    const crosses = [];
    rows.forEach((rank, number) => {
      const y = place(number), tall = number < 2 ? 12 : lane > 4 ? lane - 2 : lane;
      const moves = state.moves.get(rank) || [];
      const first = Math.max(0, moves.indexOf(lastMove(moves, begin)));
      for (let each = first; each < moves.length; each++) {
        const from = Math.max(moves[each].t, begin), to = each + 1 < moves.length ? moves[each + 1].t : end;
        if (to < begin) continue;
        const x = at(from), wide = at(to) - x;
        // What is as it should be stays behind what is not.
        context.globalAlpha = state.about.seated.includes(moves[each].state) || moves[each].state === "Ready" ? .55 : 1;
        context.fillStyle = EEP.color(moves[each].state);
        context.fillRect(x, y, Math.max(wide, .5), tall);
        context.globalAlpha = 1;
        if (moves[each].state === "Failed" || moves[each].state === "Lost") crosses.push([Math.max(x, this.gutter), y, tall]);
      }
    });
    // A rank is often back within a pixel: losses are marked above all else.
    for (const [x, y, tall] of crosses) {
      context.fillStyle = EEP.color("Failed");
      if (tall <= 8) { context.beginPath(); context.arc(x, y + tall / 2, 3, 0, 7); context.fill(); }
      else {
        context.fillRect(x - 1, y - 1, 3, tall + 2);
        context.strokeStyle = EEP.color("text");
        context.lineWidth = 1.4;
        const h = 3.2, cx = x + .5, cy = y + tall / 2;
        context.beginPath();
        context.moveTo(cx - h, cy - h); context.lineTo(cx + h, cy + h); context.moveTo(cx + h, cy - h); context.lineTo(cx - h, cy + h);
        context.stroke();
      }
    }
  }

  /** The number of the row at `y`, or -1. */
  rowAt(y) {
    const rows = this.rows(), {lane, place} = this.sizes(rows.length - 2);
    return rows.findIndex((_, n) => y >= place(n) && y < place(n) + (n < 2 ? 13 : lane));
  }

  rankAt(_, y) {
    const number = this.state.about ? this.rowAt(y) : -1;
    return number < 2 ? null : this.rows()[number];
  }

  say(x, y) {
    if (!this.state.about || x < this.gutter) return null;
    const rows = this.rows(), number = this.rowAt(y);
    if (number < 0) return null;
    const t = this.begin + (x - this.gutter) / (this.right - this.gutter) * this.span;
    const move = lastMove(this.state.moves.get(rows[number]) || [], t);
    if (!move) return null;
    const name = number === 0 ? "the group" : number === 1 ? "the fork server" : `rank ${rows[number]}.${move.incarnation}`;
    return `${name}: ${move.state}\nsince ${new Date(move.t).toLocaleTimeString()}, ${EEP.ms(this.end - t)} ago`;
  }
}

/** Where the lifecycle's states are, of a canvas of width 1 and height 1: [x, y, width, height] of each box. */
const PLACES = {
  Launching: [.05, .30, .085, .46], InitCUDA: [.195, .30, .085, .46], InitDist: [.34, .30, .085, .46],
  Joining: [.485, .30, .085, .46], Serving: [.70, .30, .21, .50], Draining: [.925, .30, .10, .46],
  Failed: [.34, .83, .26, .28], Stopped: [.925, .83, .10, .28],
};
const DWELL_MS = 280;

class Lifecycle {
  constructor(canvas, state) {
    Object.assign(this, {canvas, state, dirty: true, tokens: new Map()});
    EEP.tooltip(canvas, (x, y) => this.say(x, y));
  }

  /** The rank goes on to `to`: tokens pass each state on their way, so that the eye can follow. */
  moved(rank, to) {
    const token = this.tokens.get(rank);
    if (token) token.path.push(to);
    this.dirty = true;
  }

  reset() {
    this.tokens.clear();
    this.dirty = true;
  }

  draw(now, passed) {
    const {state} = this;
    if (!state.about || !this.dirty) return;
    const tall = 230;
    const {context, width, height} = EEP.fit(this.canvas, tall);
    const boxes = new Map(state.about.states.map((name, n) => {
      const [x, y, w, h] = PLACES[name] || [.05 + n * .1, .9, .09, .12];
      return [name, {x: (x - w / 2) * width, y: (y - h / 2) * height + 4, w: w * width, h: h * height, ranks: []}];
    }));
    this.arrows(context, boxes);
    let moving = false;
    for (const [rank, row] of state.ranks) {
      let token = this.tokens.get(rank);
      if (!token) this.tokens.set(rank, token = {at: row.state, path: [], since: 0, x: null, y: null});
      token.waited = (token.waited ?? DWELL_MS) + passed;
      if (token.path.length && token.waited >= DWELL_MS / Math.max(1, token.path.length - 3)) {
        token.at = token.path.shift();
        token.waited = 0;
      }
      if (token.path.length) moving = true;
      boxes.get(token.at)?.ranks.push(rank);
    }
    for (const rank of this.tokens.keys()) if (!state.ranks.has(rank)) this.tokens.delete(rank);
    const share = 1 - Math.exp(-passed / 110);
    context.textBaseline = "middle";
    for (const [name, box] of boxes) {
      const shade = EEP.color(name), filled = box.ranks.length > 0;
      context.globalAlpha = filled ? .16 : .05;
      context.fillStyle = shade;
      context.beginPath(); context.roundRect(box.x, box.y, box.w, box.h, 9); context.fill();
      context.globalAlpha = filled ? 1 : .55;
      context.strokeStyle = shade; context.lineWidth = filled ? 1.6 : 1;
      context.stroke();
      context.font = "600 12px " + EEP.color("sans");
      context.fillStyle = EEP.color(filled ? "text" : "dim");
      context.textAlign = "left";
      context.fillText(name, box.x + 9, box.y + 13);
      context.textAlign = "right";
      if (filled) context.fillText(box.ranks.length, box.x + box.w - 9, box.y + 13);
      context.globalAlpha = 1;
    }
    const number = state.ranks.size;
    for (const [name, box] of boxes) {
      const inner = {x: box.x + 8, y: box.y + 25, w: box.w - 16, h: box.h - 31};
      let size = number <= 16 ? 24 : number <= 64 ? 15 : 9;
      size = Math.min(size, Math.max(3, Math.sqrt(inner.w * inner.h / Math.max(1, box.ranks.length)) * .94));
      const per = Math.max(1, Math.floor(inner.w / size));
      box.ranks.sort((a, b) => a - b).forEach((rank, place) => {
        const token = this.tokens.get(rank);
        const x = inner.x + (place % per) * size + size / 2, y = inner.y + Math.floor(place / per) * size + size / 2;
        if (token.x === null) { token.x = x; token.y = y; }
        token.x += (x - token.x) * share;
        token.y += (y - token.y) * share;
        if (Math.abs(x - token.x) + Math.abs(y - token.y) > .3) moving = true;
        token.size = size;
        context.fillStyle = EEP.color(name);
        if (size >= 8) { context.beginPath(); context.arc(token.x, token.y, size * .44, 0, 7); context.fill(); }
        else context.fillRect(token.x - size * .42, token.y - size * .42, size * .84, size * .84);
        if (size >= 13) {
          context.font = `600 ${Math.round(size * .45)}px ` + EEP.color("sans");
          context.textAlign = "center";
          context.fillStyle = "#fff";
          context.fillText(rank, token.x, token.y + .5);
        }
      });
    }
    this.dirty = moving;
  }

  arrows(context, boxes) {
    const main = new Set(["process_started", "device_ready", "buffers_ready", "admitted", "drain", "relaunch"]);
    context.font = "10.5px " + EEP.color("sans");
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (const [from, to, trigger] of this.state.about.arrows) {
      const a = boxes.get(from), b = boxes.get(to);
      if (!a || !b || trigger === "stopped" && from !== "Draining") continue;
      if (trigger === "relaunch" && from !== "Failed") continue;
      const level = Math.abs(a.y + a.h / 2 - b.y - b.h / 2) < 40;
      const points = level ? [a.x + a.w, a.y + a.h / 2, b.x, b.y + b.h / 2]
        : trigger === "relaunch" ? [a.x, a.y + a.h / 2, b.x + b.w / 2, b.y + b.h]
        : [a.x + a.w / 2, a.y + a.h, Math.min(Math.max(a.x + a.w / 2, b.x + 14), b.x + b.w - 14), b.y];
      const [x, y, u, v] = points;
      context.globalAlpha = main.has(trigger) ? .9 : .4;
      context.strokeStyle = context.fillStyle = EEP.color(trigger === "lost" ? "Failed" : "dim");
      context.lineWidth = 1;
      context.setLineDash(trigger === "lost" || trigger === "stopped" ? [3, 3] : []);
      context.beginPath();
      context.moveTo(x, y);
      let angle = Math.atan2(v - y, u - x);
      if (level) context.lineTo(u, v);
      else if (trigger === "relaunch") { context.quadraticCurveTo(u, y, u, v); angle = -Math.PI / 2; }
      else { context.bezierCurveTo(x, y + 24, u, v - 24, u, v); angle = Math.PI / 2; }
      context.stroke();
      context.setLineDash([]);
      context.beginPath();
      context.moveTo(u, v);
      for (const side of [-.42, .42]) context.lineTo(u - 7 * Math.cos(angle + side), v - 7 * Math.sin(angle + side));
      context.fill();
      context.globalAlpha = 1;
      context.fillStyle = EEP.color("dim");
      const words = trigger.replaceAll("_", " ");
      if (level && u - x > context.measureText(words).width + 6) context.fillText(words, (x + u) / 2, y - 8);
      if (trigger === "relaunch") context.fillText("relaunch", u + 30, v + 14);
    }
  }

  rankAt(x, y) {
    for (const [rank, token] of this.tokens) {
      if (token.x !== null && Math.hypot(token.x - x, token.y - y) <= Math.max(3, (token.size || 8) / 2)) return rank;
    }
    return null;
  }

  say(x, y) {
    const row = this.state.ranks.get(this.rankAt(x, y));
    return row ? `rank ${row.id}.${row.incarnation}: ${row.state}\n${row.running} running, ${row.waiting} waiting` : null;
  }
}

class Experts {
  constructor(canvas, state) {
    Object.assign(this, {canvas, state, dirty: true, layer: null});
    this.chosen = 0;
    EEP.tooltip(canvas, (x, y) => this.say(x, y));
    canvas.addEventListener("click", event => {
      const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
      if (this.layer && y < 16) this.choose(this.layerAt(x));
    });
  }

  choose(layer) {
    if (layer >= 0 && layer < this.layer.least.length) { this.chosen = layer; this.wanted?.(); }
  }

  layerAt(x) { return Math.floor((x - 44) / ((this.canvas.cssWidth - 44 - 30) / this.layer.least.length)); }

  alive(rank) { return this.state.about.seated.includes(this.state.ranks.get(rank)?.state); }

  draw() {
    const {layer, state} = this;
    if (!this.dirty || !state.about) return;
    this.dirty = false;
    if (!layer) { EEP.fit(this.canvas, 300); return; }
    const {num_experts: experts, slots_per_rank: per, slots, least} = layer;
    const ranks = Math.floor(slots.length / per);
    const {context, width, height} = EEP.fit(this.canvas, 300);
    const left = 44, right = width - 30, top = 34, cw = (right - left) / ranks, ch = (height - top - 16) / experts;
    Object.assign(this, {left, top, cw, ch, ranks});
    context.font = "11px " + EEP.color("sans");
    context.textBaseline = "middle";
    context.textAlign = "right";
    context.fillStyle = EEP.color("dim");
    context.fillText("layer", left - 8, 7);
    const lw = (right - left) / least.length;
    least.forEach((copies, number) => {
      context.fillStyle = EEP.color(copies < 1 ? "bad" : copies < 2 ? "warn" : "good");
      context.globalAlpha = number === layer.layer ? 1 : .4;
      context.fillRect(left + number * lw, 0, Math.max(1, lw - (lw > 4 ? 2 : 0)), 13);
      context.globalAlpha = 1;
      context.textAlign = "center";
      context.fillStyle = EEP.color("text");
      if (lw > 16) context.fillText(number, left + (number + .5) * lw - 1, 7);
    });
    const copies = new Array(experts).fill(0);
    const every = Math.max(1, Math.ceil(27 / cw));
    context.fillStyle = EEP.color("dim");
    for (let rank = 0; rank < ranks; rank += every) context.fillText(rank, left + (rank + .5) * cw, 25);
    context.fillStyle = EEP.color("raised");
    context.fillRect(left, top, right - left, ch * experts);
    const gap = cw > 5 && ch > 5 ? 1 : 0;
    for (let rank = 0; rank < ranks; rank++) {
      const alive = this.alive(rank);
      context.fillStyle = alive ? EEP.rankColor(rank) : EEP.color("faint");
      context.globalAlpha = alive ? .9 : .55;
      for (const expert of new Set(slots.slice(rank * per, rank * per + per))) {
        if (expert < 0) continue;
        if (alive) copies[expert] += 1;
        context.fillRect(left + rank * cw, top + expert * ch, Math.max(1, cw - gap), Math.max(1, ch - gap));
      }
    }
    context.globalAlpha = 1;
    context.textAlign = "right";
    const step = Math.max(1, Math.ceil(13 / ch));
    for (let expert = 0; expert < experts; expert++) {
      const few = copies[expert] < 2;
      if (few) {
        context.fillStyle = EEP.color(copies[expert] ? "warn" : "bad");
        context.fillRect(right + 4, top + expert * ch, 4, Math.max(1, ch - gap));
      }
      if (expert % step) continue;
      context.fillStyle = EEP.color(few ? copies[expert] ? "warn" : "bad" : "dim");
      context.fillText(copies[expert], width - 4, top + (expert + .5) * ch);
      context.fillStyle = EEP.color("dim");
      context.fillText(expert, left - 8, top + (expert + .5) * ch);
    }
    this.copies = copies;
    context.textAlign = "left";
    context.fillText("expert (left), rank (above), copies that serve (right)", left, height - 6);
  }

  say(x, y) {
    if (!this.layer || !this.cw) return null;
    if (y < 16 && x >= 44) {
      const number = this.layerAt(x);
      return this.layer.least[number] === undefined ? null : `layer ${number}: at least ${this.layer.least[number]} copies of each expert\nclick to see it`;
    }
    const rank = Math.floor((x - this.left) / this.cw), expert = Math.floor((y - this.top) / this.ch);
    if (rank < 0 || rank >= this.ranks || expert < 0 || expert >= this.layer.num_experts) return null;
    const slots = this.layer.slots.slice(rank * this.layer.slots_per_rank, (rank + 1) * this.layer.slots_per_rank);
    return `expert ${expert}: ${this.copies[expert]} copies\n${slots.includes(expert) ? "" : "not "}on rank ${rank}` +
      (this.alive(rank) ? "" : ", which does not serve");
  }
}

class Pages {
  constructor(canvas, state) {
    Object.assign(this, {canvas, state, dirty: true});
    EEP.tooltip(canvas, x => this.say(x));
  }

  draw() {
    const {state} = this;
    if (!this.dirty || !state.about) return;
    this.dirty = false;
    const {context, width, height} = EEP.fit(this.canvas, 300);
    const ranks = [...state.ranks.values()].sort((a, b) => a.id - b.id);
    const left = 44, base = height - 22, top = 10, cw = (width - left) / Math.max(1, ranks.length);
    Object.assign(this, {left, cw, order: ranks});
    const most = Math.max(1, ...ranks.map(row => row.device)), shelf = Math.max(1, ...ranks.map(row => row.shelf));
    context.font = "11px " + EEP.color("sans");
    context.textBaseline = "middle";
    context.textAlign = "right";
    for (const part of [0, .5, 1]) {
      const y = base - part * (base - top);
      context.fillStyle = EEP.color("line");
      context.fillRect(left, y, width - left, 1);
      context.fillStyle = EEP.color("dim");
      context.fillText(EEP.count(Math.round(most * part)), left - 8, y);
    }
    const bar = Math.max(1, Math.min(46, cw * .62)), thin = cw > 8 ? Math.max(2, Math.min(9, cw * .14)) : 0;
    const every = Math.max(1, Math.ceil(27 / cw));
    ranks.forEach((row, place) => {
      const x = left + place * cw + (cw - bar - thin) / 2, full = base - top;
      const tall = row.device / most * full, held = row.held / most * full;
      const named = Math.max(0, Math.min(row.named, row.device) / most * full);
      context.fillStyle = EEP.color("raised");
      context.fillRect(x, base - tall, bar, tall);
      context.globalAlpha = .38;
      context.fillStyle = EEP.color("accent");
      context.fillRect(x, base - named, bar, named);
      context.globalAlpha = 1;
      context.fillRect(x, base - held, bar, held);
      if (thin) {
        context.fillStyle = EEP.color("Joining");
        const on = row.shelf / shelf * full * .9;
        context.fillRect(x + bar + 2, base - on, thin, on);
      }
      context.fillStyle = EEP.color("dim");
      context.textAlign = "center";
      if (place % every === 0) context.fillText(row.id, left + (place + .5) * cw, base + 12);
    });
  }

  say(x) {
    const row = this.order?.[Math.floor((x - this.left) / this.cw)];
    return row ? `rank ${row.id}.${row.incarnation}\n${row.held} of ${row.device} pages held by requests\n${row.named} may be shared\n` +
      `shelf: ${row.shelf} pages, ${(row.shelf_bytes / 2 ** 20).toFixed(1)} MiB` : null;
  }
}
