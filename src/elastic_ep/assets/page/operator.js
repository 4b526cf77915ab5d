"use strict";
/* What an operator may do: each after a question that says what comes of it, and with the server's own answer. */

/** How long an answer is waited for. A change of size answers when all who leave have left, and all who come are there. */
const ANSWER_MS = 330000;

const DEEDS = {
  relaunch: {
    words: "Relaunch dead ranks",
    question: () => "Every rank that is dead is launched now, however long it was to wait. Ranks that run are left alone.",
    answer: told => told.relaunched.length ? `Launched: rank ${told.relaunched.join(", ")}.` : "No rank was dead.",
  },
  scale: {
    words: "Scale",
    amount: state => [...state.ranks.values()].filter(row => row.status !== "dead").length,
    question: () => "So many ranks take part from now on. Ranks that are too many drain: their requests end or, after two minutes, " +
      "go on elsewhere. Ranks that left are launched again.",
    body: (row, amount) => ({new_data_parallel_size: amount}),
    answer: told => `${told.message}: rank ${told.ranks.join(", ")}.`,
  },
  verify: {
    words: "Verify experts",
    question: () => "Every rank reads its experts again and compares their checksums. What differs is taken out and made anew.",
    answer: told => `${told.checked} checked, ${told.differ.length} differ` +
      (told.silent.length ? `; no answer from rank ${told.silent.join(", ")}.` : "."),
  },
  rebalance: {
    words: "Rebalance",
    question: () => "Experts are spread over the ranks by the load of late. Copies are made while requests go on.",
    answer: told => `${told.made} of ${told.planned} copies made; imbalance ${told.imbalance_before.toFixed(2)}, now ${told.imbalance.toFixed(2)}.`,
  },
};

const RANK_DEEDS = {
  relaunch: {
    words: "Relaunch",
    possible: row => !row.alive,
    question: row => `Rank ${row.id} is launched now, however long it was to wait. If it runs already, nothing happens.`,
    body: row => ({rank: row.id}),
    answer: told => told.relaunched.length ? "It is launched." : "It runs already: nothing was done.",
  },
  drain: {
    words: "Drain",
    possible: row => row.alive && row.state !== "Draining",
    question: row => `Rank ${row.id}.${row.incarnation} takes no new requests. When its ${row.running + row.waiting} have ended, or after two ` +
      "minutes have gone on elsewhere, it leaves and stays away until it is launched again.",
    body: row => ({rank: row.id}),
    answer: told => told.state === "Draining" ? `It drains; ${told.data_parallel_size} ranks are to stay.` : `It is ${told.state}.`,
  },
  kill: {
    words: "Kill",
    possible: row => row.alive,
    question: (row, group) => `The process of rank ${row.id}.${row.incarnation} is killed. Its ${row.running + row.waiting} requests go on ` +
      `elsewhere, and it is launched again as after any death.` + (group.tolerates > 0 ? "" :
      " No further rank can be lost without requests having to wait: some expert has no other copy."),
    body: row => ({rank: row.id, incarnation: row.incarnation}),
    answer: (told, row) => told.killed ? "It is being killed."
      : told.incarnation === row.incarnation ? "It was gone already: nothing was done." : `Rank ${row.id}.${told.incarnation} is there by now: nothing was done.`,
  },
};

class Operator {
  /** `ask(path, options, key)` asks the server; `keys` remembers keys until the tab is closed. */
  constructor(state, ask, keys) {
    Object.assign(this, {state, ask, keys, chosen: null});
    this.sure = document.getElementById("sure");
    this.rank = document.getElementById("rank");
    this.rank.addEventListener("close", () => { this.chosen = null; });
    document.getElementById("which").onsubmit = event => {
      event.preventDefault();
      this.show(event.target.elements.number.valueAsNumber);
    };
  }

  get actions() { return this.state.about?.actions || {}; }

  /** The header's buttons, as far as this server takes orders at all. */
  offer() {
    const box = document.getElementById("actions");
    const names = Object.keys(DEEDS).filter(name => this.actions[name]);
    if (box.children.length === names.length) return;  // all of them or none, and who is about to press one hits it
    box.hidden = !names.length;
    box.replaceChildren(...names.map(name => EEP.make("button", {".onclick": () => this.question(name, DEEDS[name], {})}, DEEDS[name].words)));
  }

  /** Ask whether that is meant, and then do it. */
  question(name, deed, row) {
    const {make} = EEP, {keys} = this, path = this.actions[name].replace(/^\//, "");
    const outcome = make("p", {role: "status"});
    const key = make("input", {type: "password", autocomplete: "off", required: true, "aria-label": "The admin key", placeholder: "the admin key"});
    key.hidden = Boolean(keys.get("admin-key"));
    key.disabled = key.hidden;
    const amount = deed.amount &&
      make("input", {type: "number", min: 1, step: 1, required: true, value: deed.amount(this.state), "aria-label": "How many ranks"});
    const yes = make("button", {type: "submit", class: "yes"}, deed.words);
    const no = make("button", {type: "button", ".onclick": () => this.sure.close()}, "Cancel");
    const form = make("form", {".onsubmit": async event => {
      event.preventDefault();
      if (!key.disabled) keys.set("admin-key", key.value);
      yes.disabled = true;
      outcome.className = "";
      outcome.textContent = "Waiting for the server …";
      try {
        const options = {method: "POST", signal: AbortSignal.timeout(ANSWER_MS)};
        if (deed.body) options.body = JSON.stringify(deed.body(row, amount?.valueAsNumber));
        const told = await this.ask(path, options, "admin-key");
        outcome.className = "done";
        outcome.textContent = deed.answer(told, row);
        yes.hidden = key.hidden = true;
        amount?.remove();
        no.textContent = "Close";
      } catch (error) {
        outcome.className = "failed";
        outcome.textContent = error.name === "TimeoutError" ? `No answer within ${ANSWER_MS / 1000} s; it may still be done.`
          : error.status ? error.message : `The server could not be reached, or ended before it had answered: ${error.message}.`;
        if (error.status === 401) {
          keys.remove("admin-key");
          key.hidden = key.disabled = false;
          key.value = "";
        }
        yes.disabled = false;
      }
    }}, make("h2", {}, row.id === undefined ? deed.words : `${deed.words} rank ${row.id}.${row.incarnation}`),
    make("p", {}, deed.question(row, this.state.group)), ...(amount ? [amount] : []), key, outcome, make("div", {class: "buttons"}, no, yes));
    this.sure.replaceChildren(form);
    this.sure.showModal();
    (key.hidden ? no : key).focus();
  }

  /** One rank: what is known of it, and what may be done to it. */
  async show(rank) {
    if (!this.state.ranks.has(rank)) return;
    this.chosen = rank;
    this.about = null;
    this.tell();
    if (!this.rank.open) this.rank.showModal();
    try {
      const told = await this.ask("v1/fault_tolerance/status", {signal: AbortSignal.timeout(10000)});
      if (this.chosen === rank) this.about = told.engines.find(engine => engine.id === rank);
    } catch (error) {
      if (this.chosen === rank) this.about = {failed: error.message};
    }
    if (this.chosen === rank) this.tell();
  }

  /** The chosen rank as it is now. HAZARD: a button that is made anew between press and release hears no click. */
  tell() {
    if (this.chosen === null) return;
    const {make} = EEP, {ranks} = this.state, found = ranks.get(this.chosen);
    if (!found) { this.rank.close(); return; }
    const row = this.row = {...found, alive: found.status !== "dead"};
    // What the status said is of one incarnation: of another it would be wrong.
    const about = this.about?.failed || this.about?.incarnation === row.incarnation ? this.about : null;
    const facts = [["state", row.state], ["requests", `${row.running} running, ${row.waiting} waiting`],
      ["pages", `${row.held} of ${row.device} held by requests, ${row.named} may be shared; shelf ${row.shelf}`],
      ...(about?.pid ? [["process", `${about.pid}`]] : []), ...(about?.reason ? [["why", about.reason]] : []),
      ...(about?.failed ? [["more", about.failed]] : [])];
    this.rank.querySelector("h2").textContent = `Rank ${row.id}.${row.incarnation}`;
    this.rank.querySelector("dl").replaceChildren(...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
    const deeds = Object.entries(RANK_DEEDS).filter(([name, deed]) => this.actions[name] && deed.possible(row));
    const offered = `${row.id} ${row.incarnation} ${deeds.map(([name]) => name)} ${this.live}`;
    if (offered === this.offered) return;
    this.offered = offered;
    this.rank.querySelector("span").replaceChildren(...deeds
      .map(([name, deed]) => make("button", {type: "button", disabled: !this.live, ".onclick": () => this.question(name, deed, this.row)}, deed.words)));
  }

  /** Whether what the page shows is so now; else nothing may be asked for. */
  set up(live) {
    this.live = live;
    document.getElementById("actions").disabled = !live;
    this.tell();
  }
}
