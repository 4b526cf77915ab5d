"use strict";
/* What the page and a film share: colours, canvases that fit their box, numbers as text. */
const EEP = (() => {
  const styles = new Map();
  const root = document.documentElement;
  matchMedia("(prefers-color-scheme: light)").addEventListener("change", () => styles.clear());

  /** The value of a custom property, e.g. color("Serving"). */
  function color(name) {
    let found = styles.get(name);
    if (found === undefined) {
      found = getComputedStyle(root).getPropertyValue("--" + name).trim() || "#888";
      styles.set(name, found);
    }
    return found;
  }

  /** A colour for each rank, neighbours far apart; none of red and green, which mean something here. */
  function rankColor(rank) {
    if (rank < 0) return color("faint");
    const light = matchMedia("(prefers-color-scheme: light)").matches;
    const hue = 178 + (rank * 0.618034 % 1) * 140;
    return `hsl(${hue} 68% ${(light ? 44 : 60) + (rank % 3) * 6}%)`;
  }

  /** Make a canvas as sharp as its box; its context in CSS pixels, with `width` and `height` of these. */
  function fit(canvas, height) {
    const ratio = devicePixelRatio || 1;
    const width = Math.max(1, Math.floor(canvas.parentElement.clientWidth));
    if (canvas.cssWidth !== width || canvas.cssHeight !== height || canvas.ratio !== ratio) {
      Object.assign(canvas, {cssWidth: width, cssHeight: height, ratio});
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
      canvas.style.height = height + "px";
    }
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    return {context, width, height};
  }

  /** An element with attributes, properties (a leading dot) and children; text is always text. */
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith(".")) element[name.slice(1)] = value;
      else if (value !== false && value !== null) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.filter(child => child !== null));
    return element;
  }

  function ms(value) {
    if (value === null || value === undefined) return "";
    const size = Math.abs(value);
    if (size >= 60000) return `${(value / 60000).toFixed(1)} min`;
    if (size >= 10000) return `${(value / 1000).toFixed(1)} s`;
    if (size >= 1000) return `${(value / 1000).toFixed(2)} s`;
    return `${size >= 100 ? value.toFixed(0) : size >= 10 ? value.toFixed(1) : value.toFixed(2)} ms`;
  }

  function count(value) {
    return value >= 1e6 ? `${(value / 1e6).toFixed(1)} M` : value >= 1e4 ? `${(value / 1e3).toFixed(1)} k` : `${value}`;
  }

  const tip = make("div", {class: "tip", hidden: true});
  addEventListener("DOMContentLoaded", () => document.body.append(tip));

  /** Show what `say(x, y)` returns beside the pointer over a canvas; null hides it. */
  function tooltip(canvas, say) {
    canvas.addEventListener("pointermove", event => {
      const box = canvas.getBoundingClientRect();
      const text = say(event.clientX - box.left, event.clientY - box.top);
      tip.hidden = !text;
      if (!text) return;
      tip.textContent = text;
      const host = canvas.closest("dialog") || document.body;
      if (tip.parentElement !== host) host.append(tip);
      const x = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 6);
      const y = event.clientY + 16 + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 10 : event.clientY + 16;
      tip.style.transform = `translate(${x}px, ${y}px)`;
    });
    canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  }

  /** Lines of a time axis from `a` to `b` (ms), `width` pixels wide: [pixel, time] of each. */
  function ticks(a, b, width, wanted = 90) {
    const rough = (b - a) / Math.max(1, width / wanted);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map(factor => factor * power).find(size => size >= rough) || rough;
    const found = [];
    for (let t = Math.ceil(a / step) * step; t <= b; t += step) found.push([(t - a) / (b - a) * width, t]);
    return found;
  }

  const CLOCK_STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300].map(seconds => seconds * 1000);

  /** As `ticks`, at the steps of a clock. */
  function clockTicks(a, b, width, wanted = 90) {
    const step = CLOCK_STEPS.find(size => size >= (b - a) / Math.max(1, width / wanted)) || 600000;
    const found = [];
    for (let t = Math.ceil(a / step) * step; t <= b; t += step) found.push([(t - a) / (b - a) * width, t]);
    return found;
  }

  /** A time before now, in words: "−1:30". */
  function clock(t) {
    const seconds = Math.round(Math.abs(t) / 1000);
    if (!seconds) return "now";
    return seconds < 60 ? `−${seconds} s` : `−${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
  }

  return {clock, clockTicks, color, rankColor, fit, make, ms, count, tooltip, ticks};
})();
