// The behavior of the page: the slider over thresholds, the choice of a policy, replica or target,
// and the class tables that follow the slider.
const element = id => document.getElementById(id);
const read = id => JSON.parse(element(id).textContent);
const data = read("data"), specs = read("charts");
const slider = element("threshold"), chooser = element("replica"), chosen = element("policy");
let replica = data.best;
const number = value => value === null ? "–" : value.toFixed(4);  // null if the model diverged
const write = (cell, text) => { if (cell.textContent !== text) cell.textContent = text; };
const policy = () => data.policies[replica][chosen.value];
const [CURVE, GRID, SINGLE, RECOMMENDED, SLIDER, BOUNDS] = [0, 1, 2, 3, 4, 5];  // traces of the curve

for (const [id, spec] of Object.entries(specs)) chart(element(id), spec);
const curveChart = element("curve").chart;

// A table lists thresholds, strictest target first: a target chooses the last row it allows.
function lookUp(table, target) {
  const sign = table.at_most ? 1 : -1;
  return table.value.filter(value => sign * value <= sign * target + table.tolerance).length - 1;
}

function showTarget() {
  const output = element("target-result"), name = element("target").value;
  output.textContent = "";
  if (element("target-value").value === "") return;
  const table = policy().targets[name], target = Number(element("target-value").value);
  const certified = name === "risk" || name === "agreement";
  if (!table) {
    output.textContent = "cannot be met: thresholds of this policy cannot be certified";
    return;
  }
  const most = data.exits[replica].at(-1).cost;
  if (name === "cost" && target > most + 1e-5) {  // as in resolver.py
    output.textContent = `cost is a share of the full model's layers, which is at most ${Number(most.toFixed(5))}`;
    return;
  }
  const row = lookUp(table, target);
  if (row < 0) {
    if (!table.value.length) {
      output.textContent = "cannot be met: the training of this replica diverged";
      return;
    }
    const best = `${name === "accuracy" ? data.metric : name} ${table.best[0].toFixed(4)}`;
    output.textContent = `cannot be ${certified ? "certified: the best" : "met: the best on the calibration rows"} is ${best}`;
    return;
  }
  const source = certified ? table : policy().curve, at = certified ? row : table.at[row];
  const threshold = source.threshold[at], cost = source.cost[at], metric = source.score[at];
  if (certified) {
    curveChart.update({[SLIDER]: {x: [cost], y: [metric]}});
  } else {
    slider.value = at;
    showPoint();
  }
  let words = `threshold ${threshold}; validation rows: cost ${cost.toFixed(4)}, ${data.metric} ${number(metric)}`;
  if (certified) {
    words = `certified with 95% confidence: ${name} ${table.reached[row].toFixed(4)} at ${words} ` +
      "(for confidences fitted on half of the calibration rows)";
  } else if (name !== "accuracy" || data.metric === "accuracy") {
    const gap = (name === "cost" ? cost : metric) - target;
    const digits = Math.abs(gap).toFixed(4);
    const difference = Number(digits) === 0 ? "at" : `${digits} ${gap < 0 ? "below" : "above"}`;
    words += `; ${difference} the target`;
  }
  output.textContent = words;
}

function showPoint() {
  const curve = policy().curve, at = Number(slider.value), shares = curve.shares[at];
  const threshold = curve.threshold[at], cost = curve.cost[at], metric = curve.score[at];
  element("at-threshold").textContent = threshold;
  element("at-cost").textContent = cost.toFixed(4);
  element("at-score").textContent = number(metric);
  let words = `threshold ${threshold}: cost ${cost.toFixed(4)}, ${data.metric} ${number(metric)}`;
  if (data.milliseconds) {
    const time = shares.reduce((sum, share, e) => sum + share * data.milliseconds[e], 0).toPrecision(3);
    element("at-milliseconds").textContent = time;
    words += `, ${time} milliseconds`;
  }
  slider.setAttribute("aria-valuetext", words);
  curveChart.update({[SLIDER]: {x: [cost], y: [metric], text: [`threshold ${threshold}`]}});
  element("shares").querySelectorAll("tr").forEach((row, e) => {
    row.cells[1].textContent = `${(100 * shares[e]).toFixed(1)}%`;
    row.cells[2].firstElementChild.style.width = `${100 * shares[e]}%`;
  });
  if (tables) tables.show(at);
}

function showReplica() {
  const {curve, start} = policy(), exits = data.exits[replica], bounds = data.bounds[replica];
  const own = chosen.selectedIndex === 0;  // the grid exists only for the run's own policy
  const grid = own ? data.grids[replica] : {cost: [], score: [], threshold: []};
  const changes = {
    [CURVE]: {x: curve.cost, y: curve.score, text: curve.threshold.map(t => `threshold ${t}`)},
    [GRID]: {x: grid.cost, y: grid.score},
    [SINGLE]: {x: exits.map(row => row.cost), y: exits.map(row => row.score)},
    [RECOMMENDED]: {x: [curve.cost[start]], y: [curve.score[start]], text: [`threshold ${curve.threshold[start]}`]},
  };
  data.bound_names.forEach((name, i) => {
    const bound = own || name !== "best_thresholds" ? bounds[name] : undefined;  // depends on the policy
    changes[BOUNDS + i] = bound ? {x: bound.cost, y: bound.score} : {x: [], y: []};
  });
  curveChart.update(changes);
  element("about").textContent = chosen.selectedOptions[0].title;
  slider.max = curve.threshold.length - 1;
  slider.value = start;
  showPoint();
  showTarget();
}

// Collapsed sections are printed too.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const part of folded) part.open = true;
});
addEventListener("afterprint", () => { for (const part of folded) part.open = false; });

// Class tables, from the labels, predictions and exits of the best replica's rows in the page.
function classTables(rows) {
  const unpack = text => new Uint16Array(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);
  const labels = unpack(rows.labels), predictions = unpack(rows.predictions), count = labels.length;
  const exits = predictions.length / count, classes = data.classes;
  const leaves = Object.fromEntries(Object.entries(rows.leaves).map(([name, text]) => [name, unpack(text)]));
  const lines = [...document.querySelectorAll("tr[data-class]")].map(row => [Number(row.dataset.class), [...row.cells]]);
  const cells = [...document.querySelectorAll("#matrix tbody tr")].map(row => [...row.querySelectorAll("td")]);
  const pairs = [...document.querySelectorAll("#pairs tr[data-cell]")].map(row => [Number(row.dataset.cell), row.cells[2]]);
  const share = (part, whole) => whole ? part / whole : 0;

  function tally(left, at) {
    const matrix = new Uint32Array(classes * classes), taken = new Uint32Array(classes * exits);
    for (let i = 0; i < count; i++) {
      let e = 0;
      while (e < exits - 1 && at >= left[e * count + i]) e++;
      matrix[labels[i] * classes + predictions[e * count + i]]++;
      taken[labels[i] * exits + e]++;
    }
    return [matrix, taken];
  }

  function show(at) {
    const left = leaves[chosen.value], fits = left && replica === data.best;
    element("classes-at").textContent = fits
      ? `At the slider's threshold ${policy().curve.threshold[at]}, on ${count.toLocaleString("en")} validation rows.`
      : data.classes_at;
    if (!fits) return;
    const [matrix, taken] = tally(left, at), support = new Uint32Array(classes), given = new Uint32Array(classes);
    matrix.forEach((n, i) => { support[Math.floor(i / classes)] += n; given[i % classes] += n; });
    for (const [c, row] of lines) {
      const right = matrix[c * classes + c], precision = share(right, given[c]), recall = share(right, support[c]);
      const f1 = share(2 * right, given[c] + support[c]);
      [precision, recall, f1].forEach((value, k) => write(row[2 + k], support[c] ? value.toFixed(3) : "–"));
      for (let e = 0; e < exits; e++) {
        write(row[8 + e], support[c] ? `${(100 * taken[c * exits + e] / support[c]).toFixed(0)}%` : "–");
      }
    }
    cells.forEach((row, i) => row.forEach((cell, j) => {
      const n = matrix[i * classes + j];
      write(cell, String(n));
      cell.className = i === j ? "right" : n ? "wrong" : "";
      cell.style.setProperty("--share", share(n, support[i]));
    }));
    for (const [cell, shown] of pairs) write(shown, String(matrix[cell]));
  }
  return {show};
}

const tables = data.rows && classTables(data.rows);
slider.addEventListener("input", () => { element("target-result").textContent = ""; showPoint(); });
element("recommended").addEventListener("click", () => { slider.value = policy().start; showPoint(); });
chosen.addEventListener("change", showReplica);
for (const id of ["target", "target-value"]) element(id).addEventListener("input", showTarget);
if (chooser) chooser.addEventListener("change", () => {
  replica = Number(chooser.value);
  const known = data.policies[replica];  // all for the best replica, only the run's own for others
  if (!known[chosen.value]) chosen.selectedIndex = 0;
  for (const option of chosen.options) option.disabled = !known[option.value];
  showReplica();
});
showReplica();
