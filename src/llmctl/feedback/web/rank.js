"use strict";
const $ = (id) => document.getElementById(id);
const PLACES = ["Best", "2nd", "3rd", "4th", "5th", "6th", "7th", "8th", "9th"];
let view = null; // what the server said last
let groups = []; // the responses picked so far, best first; those in one group tie
let tieNext = false;
let busy = false;
let timer = 0;

history.replaceState(null, "", "/"); // the token has done its work

async function ask(path, body) {
  if (busy) return;
  busy = true;
  try {
    const options = body && {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    };
    const answer = await fetch(path, options);
    if (answer.ok || answer.status === 409) {
      warn("");
      show(await answer.json());
    } else {
      warn((await answer.text()).trim());
    }
  } catch {
    warn("llmctl rank has ended, or cannot be reached. All answers so far are kept: start it again and open its new address.");
  }
  busy = false;
}

function warn(text) {
  $("alert").textContent = text;
  $("alert").hidden = !text;
}

function show(state) {
  const isNew = !view || view.phase !== state.phase || view.key !== state.key;
  view = state;
  $("annotator").textContent = state.annotator;
  $("counts").textContent = `${state.settled} of ${state.total}`;
  $("bar").style.width = `${state.total ? (100 * state.settled) / state.total : 100}%`;
  $("progress").setAttribute("aria-valuemax", state.total);
  $("progress").setAttribute("aria-valuenow", state.settled);
  $("progress").setAttribute("aria-valuetext", `${state.settled} of ${state.total}`);
  const isEnd = state.phase === "done" || state.phase === "stopped";
  $("ask").hidden = $("tools").hidden = state.phase !== "ask";
  $("wait").hidden = state.phase !== "wait";
  $("end").hidden = !isEnd;
  $("stop").hidden = isEnd;
  document.title = isEnd ? "Rank: done" : `Rank: ${state.settled + 1} of ${state.total}`;
  clearTimeout(timer);
  if (state.phase === "wait") timer = setTimeout(() => ask("/state"), 500);
  if (isEnd) showEnd(state);
  if (state.phase === "ask" && isNew) showQuestion(state);
  if (state.phase === "ask") showPicks();
}

function showQuestion(state) {
  groups = [];
  tieNext = false;
  $("prompt").replaceChildren(...state.prompt.map(([role, text]) => turn(role, text)));
  $("cards").replaceChildren(...state.responses.map(card));
  window.scrollTo(0, 0);
  $("prompt").scrollTop = 0;
  $("prompt-title").focus({ preventScroll: true });
}

function element(name, kind, text) {
  const made = document.createElement(name);
  made.className = kind;
  if (text !== undefined) made.textContent = text;
  return made;
}

function textOf(name, text) {
  const made = element(name, text ? "text" : "text empty", text || "(empty)");
  made.dir = "auto";
  return made;
}

function turn(role, text) {
  const made = element("div", "turn");
  if (role !== "prompt") made.append(element("span", "role", role));
  made.append(textOf("div", text));
  return made;
}

function card(text, place) {
  const made = element("li", "card");
  const button = element("button", "pick");
  button.type = "button";
  const body = textOf("div", text);
  body.id = `text-${place}`;
  button.setAttribute("aria-describedby", body.id);
  button.append(element("span", "number", place + 1), element("span", "place"));
  made.append(button, body);
  made.addEventListener("click", (event) => {
    const isSelecting = String(getSelection()) && !button.contains(event.target);
    if (!isSelecting) pick(place);
  });
  return made;
}

function picked() {
  return groups.flat();
}

function pick(place) {
  if (busy || view.phase !== "ask" || place >= view.responses.length) return;
  if (picked().includes(place)) {
    drop(place);
    return;
  }
  if (tieNext && groups.length) groups.at(-1).push(place);
  else groups.push([place]);
  tieNext = false;
  showPicks();
  say(`Response ${place + 1}: ${placeName(place)}`);
}

function drop(place) {
  groups = groups.map((group) => group.filter((other) => other !== place)).filter((g) => g.length);
  tieNext = false;
  showPicks();
  say(`Response ${place + 1} is not picked any more`);
}

function placeName(place) {
  const rank = groups.findIndex((group) => group.includes(place));
  if (rank < 0) return "";
  return PLACES[rank] + (groups[rank].length > 1 ? ", tied" : "");
}

function showPicks() {
  const left = view.responses.map((_, place) => place).filter((p) => !picked().includes(p));
  const last = groups.length ? (left.length > 1 ? "last, tied" : "last") : "";
  [...$("cards").children].forEach((item, place) => {
    const isPicked = !left.includes(place);
    const name = isPicked ? placeName(place) : last;
    const button = item.querySelector(".pick");
    item.classList.toggle("picked", isPicked);
    item.querySelector(".place").textContent = name;
    item.querySelector(".place").hidden = !name;
    item.querySelector(".place").classList.toggle("rest", !isPicked);
    button.setAttribute("aria-pressed", isPicked);
    button.setAttribute("aria-label", `Response ${place + 1}${name ? `: ${name}` : ""}`);
  });
  $("order").replaceChildren(...orderOf(left));
  $("tie").disabled = !left.length || !groups.length;
  $("tie").setAttribute("aria-pressed", tieNext);
  $("unpick").disabled = $("confirm").disabled = !groups.length;
  $("undo").disabled = !view.can_undo;
}

function orderOf(left) {
  if (!groups.length) return ["Pick the best first. What you leave out shares the last place."];
  const numbers = (places) => places.map((place) => place + 1).join(" = ");
  const order = element("b", "", groups.map(numbers).join(" › ") + (tieNext ? " = …" : ""));
  return [order, left.length && !tieNext ? ` › ${numbers(left)}` : ""];
}

function say(text) {
  $("said").textContent = text;
}

function tie() {
  if ($("tie").disabled) return;
  tieNext = !tieNext;
  showPicks();
  say(tieNext ? "The next one ties with the last" : "No tie");
}

function unpick() {
  if (tieNext) tie();
  else if (groups.length) drop(groups.at(-1).at(-1));
}

function confirm() {
  if (view.phase !== "ask" || !groups.length) return;
  const ranks = view.responses.map((_, place) => {
    const rank = groups.findIndex((group) => group.includes(place));
    return rank < 0 ? groups.length + 1 : rank + 1;
  });
  ask("/answer", { key: view.key, ranks });
}

function skip() {
  if (view.phase === "ask") ask("/skip", { key: view.key });
}

function undo() {
  if (view.can_undo && view.phase !== "stopped") ask("/undo", {});
}

function showEnd(state) {
  const isDone = state.remaining === 0;
  const skipped = state.skipped ? `, ${state.skipped} skipped` : "";
  const same = state.identical ? ` Left out: ${state.identical} whose responses are all the same.` : "";
  $("tick").hidden = !isDone;
  $("end-title").textContent = isDone ? "All done" : "Stopped here";
  $("end-text").textContent =
    `${state.answered} answered${skipped}` +
    (isDone ? `.${same}` : `, ${state.remaining} to go. The same command goes on from here.`) +
    (state.phase === "stopped" ? " You can close this page." : "");
  $("out").textContent = state.out;
  $("command").textContent = state.command;
  $("end-actions").hidden = state.phase === "stopped";
  $("end-undo").disabled = !state.can_undo;
  window.scrollTo(0, 0);
  $("end-title").focus({ preventScroll: true });
}

async function copy() {
  await navigator.clipboard.writeText($("command").textContent);
  $("copy").textContent = "Copied";
  setTimeout(() => ($("copy").textContent = "Copy"), 1500);
}

const ACTIONS = {
  tie, unpick, skip, undo, confirm, copy,
  "end-undo": undo,
  stop: () => ask("/finish", {}),
  finish: () => ask("/finish", {}),
};
for (const [id, act] of Object.entries(ACTIONS)) $(id).addEventListener("click", act);

let clickedOn = null; // the view of the first click of several

document.addEventListener("click", (event) => {
  // a button that was clicked must not take the Enter that confirms
  if (event.detail > 0) document.activeElement?.blur();
  // the second click of a double one must not act on what the first has brought
  if (event.detail <= 1) clickedOn = view;
  else if (busy || clickedOn !== view) event.stopImmediatePropagation();
}, true);

document.addEventListener("keydown", (event) => {
  if (!view || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const key = event.key.toLowerCase();
  const isOnButton = event.target.closest("button") !== null;
  const keys = { "=": tie, t: tie, backspace: unpick, s: skip, u: undo, enter: confirm };
  if (key === "enter" && isOnButton) return;
  if (/^[1-9]$/.test(key)) pick(Number(key) - 1);
  else if (Object.hasOwn(keys, key)) keys[key]();
  else return;
  event.preventDefault();
});

ask("/state");
