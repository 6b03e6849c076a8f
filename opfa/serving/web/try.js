"use strict";
// Ask this server about what stands in the form, and show what it says. Answers become text, never markup.

const DATA = JSON.parse(document.getElementById("data").textContent);
const form = document.getElementById("form");
const send = document.getElementById("send");
const answer = document.getElementById("answer");
const command = document.getElementById("command");
const fields = [...form.querySelectorAll("textarea")];
const url = new URL("predict", location.href).href;
const MOST_SHARES = 12;

function element(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;
const lines = (text) => text.split("\n").filter((line) => line.trim());

// A text alone, or a row by column.
function inputs() {
  const row = {};
  for (const field of fields) row[field.dataset.column] = "list" in field.dataset ? lines(field.value) : field.value;
  return fields.length === 1 ? fields[0].value : row;
}

function shares(pairs, best) {
  const list = element("dl", "shares");
  const sorted = pairs.toSorted((a, b) => b[1] - a[1]);
  for (const [name, share] of sorted.slice(0, MOST_SHARES)) {
    const bar = element("i");
    bar.style.width = percent(share).replace(" ", "");
    const track = element("div", "track", bar);
    track.setAttribute("aria-hidden", "true");
    list.append(element("dt", name === best ? "best" : "", name), track, element("dd", "", percent(share)));
  }
  const rest = sorted.length - MOST_SHARES;
  return rest > 0 ? [list, element("p", "note", `and ${rest} more`)] : [list];
}

function number(value) {
  return value === null ? "not a finite number" : String(Number(value.toPrecision(5)));
}

function spans(text, start, end) {
  const points = [...text]; // the server counts characters, JavaScript halves of some
  const part = (from, to) => points.slice(from, to).join("");
  return element("p", "", part(0, start), element("mark", "", part(start, end)), part(end));
}

const SHOW = {
  classification: (found) => [element("p", "said", found.prediction), ...shares(Object.entries(found.probabilities), found.prediction)],
  regression: (found) => [element("p", "said", number(found.prediction))],
  "question-answering": (found, asked) => {
    if (!found.prediction) return [element("p", "said", "no answer"), element("p", "note", percent(found.score))];
    return [element("p", "said", found.prediction), element("p", "note", percent(found.score)), spans(asked[DATA.pair], found.start, found.end)];
  },
  "token-classification": (found, asked) => {
    const list = element("p", "words");
    asked.trim().split(/\s+/).forEach((word, index) => {
      const tag = found.prediction[index];
      const made = element("span", tag === "O" ? "" : "tagged", word, element("b", "", tag));
      made.title = percent(found.score[index]);
      list.append(made, " ");
    });
    return [list];
  },
  "multiple-choice": (found, asked) => {
    const names = Object.values(asked).flat().slice(-found.probabilities.length);
    const list = names.map((name, index) => [name, found.probabilities[index]]);
    return [element("p", "said", names[found.prediction]), ...shares(list, names[found.prediction])];
  },
  embedding: (found) => {
    if (typeof found.prediction === "number") return [element("p", "said", number(found.prediction)), element("p", "note", "cosine of the two vectors")];
    const vector = found.prediction;
    const length = Math.hypot(...vector).toFixed(3);
    return [element("p", "said", `${vector.length} numbers`), element("p", "mono", `${vector.slice(0, 8).map(number).join(", ")}, …`), element("p", "note", `length ${length}`)];
  },
};

function show(...parts) {
  answer.replaceChildren(...parts);
}

async function ask() {
  const asked = inputs();
  const body = JSON.stringify({ inputs: asked, parameters: { probabilities: true } });
  const start = performance.now();
  send.disabled = true;
  try {
    const response = await fetch(url, { method: "POST", headers: { "Content-Type": "application/json" }, body });
    const found = await response.json();
    const milliseconds = (performance.now() - start).toFixed(1);
    if (!response.ok) return show(element("p", "problem", found.error), element("p", "note", `status ${response.status}`));
    const whole = element("details", "", element("summary", "", "JSON"), element("pre", "", JSON.stringify(found, null, 1)));
    show(...SHOW[DATA.kind](found, asked), element("p", "note", `${milliseconds} ms, there and back`), whole);
  } catch (error) {
    show(element("p", "problem", `The server can't be reached, or its answer can't be read (${error.message}).`));
  } finally {
    send.disabled = false;
  }
}

function tell() {
  const body = JSON.stringify({ inputs: inputs() }).replaceAll("'", "'\\''");
  command.textContent = `curl ${url} -H 'Content-Type: application/json' \\\n  -d '${body}'`;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
form.addEventListener("input", tell);
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !send.disabled) {
    event.preventDefault();
    ask();
  }
});
document.getElementById("copy").addEventListener("click", async () => {
  const copied = document.getElementById("copied");
  try {
    await navigator.clipboard.writeText(command.textContent);
    copied.textContent = "copied";
  } catch {
    getSelection().selectAllChildren(command);
    copied.textContent = "selected; copy it with your keys";
  }
});
tell();
