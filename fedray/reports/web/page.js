"use strict";
// Numbers for axes: short, and none that is not there.
function short(value) {
  if (typeof value !== "number") return value;
  const size = Math.abs(value);
  return size >= 1e4 ? d3.format("~s")(value) : size && size < 1e-3 ? d3.format("~e")(value) : String(+value.toPrecision(4));
}

// Numbers to read: four digits.
function number(value) {
  const size = Math.abs(value), digits = {minimumSignificantDigits: 4, maximumSignificantDigits: 4};
  return value === null ? "–" : size && size < 1e-4 ? value.toExponential(3) : value.toLocaleString("en", digits);
}

// What is ticked: of a chapter without boxes all.
function ticked(element) {
  const boxes = [...element.closest(".chapter").querySelectorAll(".compare input")];
  return index => !boxes.length || boxes[index].checked;
}

function swatch(colour, dash, name) {
  const item = document.createElement("li");
  item.innerHTML = '<svg class="swatch" viewBox="0 0 24 8" aria-hidden="true"><line x2="24" y1="4" y2="4" stroke-width="4"/></svg>';
  item.querySelector("line").setAttribute("stroke", colour);
  item.querySelector("line").setAttribute("stroke-dasharray", dash);
  item.append(name);
  return item;
}

// A chart of lines: bands, bars of deviations, lines and points, of what is ticked.
function lines(figure, {axes, figure: chart}) {
  const axis = axes[figure.querySelector(".axis").value], shown = ticked(figure), marks = [], points = [], names = [];
  const bottom = d3.min(chart.lines.flatMap(line => line.y));
  for (const line of chart.lines) {
    const mine = line.y.map((y, k) => ({
      x: line.x[axis.key][k], y, of: line.of[k] ?? line.of, low: line.low?.[k], high: line.high?.[k], std: line.std?.[k],
      text: [line.where?.[k] ?? `round ${line.x.round[k]}`, `${line.measured} ${number(y)}`,
        ...line.count?.[k] > 1 ? [`${number(line.low[k])} to ${number(line.high[k])} over ${line.count[k]} seeds`] : []].join("\n"),
    })).filter(point => point.y !== null && point.x !== null && shown(point.of));
    if (!mine.length) continue;
    const name = line.name, along = {x: "x", y: "y"};
    const stroke = line.each ? point => figure.styles[point.of] : line.colour;
    if (!line.each) names.push([line.colour, line.dash, name]);
    for (const point of mine) points.push({...point, text: line.each || !name ? point.text : `${name}\n${point.text}`});
    if (line.band) marks.push(Plot.areaY(mine, {x: "x", y1: "low", y2: "high", fill: line.colour, fillOpacity: .2}));
    if (line.std?.some(Boolean)) {
      const least = chart.log ? bottom / 2 : -Infinity;
      marks.push(Plot.ruleX(mine, {x: "x", y1: ({y, std}) => Math.max(least, y - std), y2: ({y, std}) => y + std, stroke}));
    }
    if (line.joined) marks.push(Plot.lineY(mine, {...along, stroke: line.colour, strokeWidth: 2, strokeDasharray: line.dash || null}));
    if (mine.length <= 50) marks.push(Plot.dot(mine, {...along, fill: stroke, r: mine.length > 20 ? 2.5 : 4}));
  }
  if (chart.real !== null) marks.unshift(Plot.ruleY([chart.real], {stroke: "#8c8c8c", strokeWidth: 2, strokeDasharray: "2 4"}));
  return {
    points, names: names.length > 1 ? names : [],
    options: {
      x: {label: axis.title, type: axis.type},
      y: {label: chart.measured + (chart.log ? " (log)" : ""), type: chart.log ? "log" : "linear", nice: !chart.log},
      marks: [
        Plot.axisX({ticks: axis.ticks ?? undefined, text: short}), Plot.axisY({ticks: 6, text: short}), Plot.gridY({ticks: 6}), ...marks,
        Plot.tip(points, Plot.pointer({x: "x", y: "y", title: "text", lineHeight: 1.3})),
      ],
    },
  };
}

// A chart of stacked bars over rounds, of one setting.
function stack(figure, {figure: chart}) {
  const group = chart.groups[figure.querySelector(".group")?.value ?? 0], bars = [];
  const points = group.x.map((x, k) => {
    const values = chart.parts.map(part => group.y[part.key][k]), sum = d3.sum(values);
    const parts = chart.parts.map((part, index) => values[index] ? `\n${part.name} ${short(values[index])}` : "");
    return {x, y: sum, text: `round ${x}: ${short(sum)} ${chart.measured}${parts.join("")}`};
  });
  chart.parts.forEach(part => group.x.forEach((x, k) => bars.push({x, y: group.y[part.key][k], part: part.name})));
  const every = Math.ceil(group.x.length / 12);
  return {
    points, names: chart.parts.map(part => [part.colour, "", part.name]),
    options: {
      x: {label: "round", type: "band", domain: group.x, ticks: group.x.filter((_, k) => k % every === 0), padding: .15},
      y: {label: chart.measured, grid: true, tickFormat: short, ticks: 6},
      color: {domain: chart.parts.map(part => part.name), range: chart.parts.map(part => part.colour)},
      marks: [
        Plot.barY(bars, {x: "x", y: "y", fill: "part"}), Plot.ruleY([0]),
        Plot.tip(points, Plot.pointerX({x: "x", y: "y", title: "text", lineHeight: 1.3})),
      ],
    },
  };
}

const KINDS = {lines, stack};
function draw(figure) {
  const box = figure.querySelector(".chart"), {points, names, options} = KINDS[figure.given.figure.kind](figure, figure.given);
  const svg = Plot.plot({width: box.clientWidth, height: 340, marginTop: 32, marginLeft: 56, marginRight: 16, marginBottom: 42, ...options});
  svg.setAttribute("aria-hidden", "true"); // the box says what it is
  box.replaceChildren(svg);
  box.points = points;
  box.scales = {x: svg.scale("x"), y: svg.scale("y")};
  figure.querySelector(".legend").replaceChildren(...names.map(name => swatch(...name)));
  figure.querySelector(".reading").textContent = "";
  figure.drawn = box.clientWidth;
}

// By keyboard: arrows go from point to point, and say what each is.
function read(figure, step) {
  const box = figure.querySelector(".chart"), {points, scales: {x, y}} = box;
  if (!points.length) return;
  box.at = ((box.at ?? (step > 0 ? -1 : 0)) + step + points.length) % points.length;
  const point = points[box.at], circle = document.createElementNS("http://www.w3.org/2000/svg", "circle");
  const place = {cx: x.apply(point.x) + (x.bandwidth ?? 0) / 2, cy: y.apply(point.y), r: 8, fill: "none", stroke: "currentColor", "stroke-width": 2};
  for (const [name, value] of Object.entries(place)) circle.setAttribute(name, value);
  circle.classList.add("at");
  box.querySelector(".at")?.remove();
  box.querySelector("svg").append(circle);
  figure.querySelector(".reading").textContent = point.text.replaceAll("\n", " · ");
}

const figures = [...document.querySelectorAll(".figure")];
for (const figure of figures) {
  figure.given = JSON.parse(figure.querySelector("script").textContent);
  const lines = figure.closest(".chapter").querySelectorAll(".compare line");
  figure.styles = [...lines].map(line => line.getAttribute("stroke"));
  draw(figure);
  figure.addEventListener("change", () => draw(figure));
  figure.querySelector(".chart").addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    if (!step) return;
    event.preventDefault();
    read(figure, step);
  });
}
addEventListener("resize", () => figures.filter(figure => figure.drawn !== figure.querySelector(".chart").clientWidth).forEach(draw));

// Pictures: those of the runs that are ticked, after the same round.
for (const viewer of document.querySelectorAll(".viewer")) {
  const slider = viewer.querySelector("input"), label = viewer.querySelector("output"), all = [...viewer.querySelectorAll("img")];
  const numbers = [...new Set(all.map(picture => Number(picture.dataset.number)))].sort((one, other) => one - other);
  slider.max = slider.value = numbers.length - 1;
  slider.hidden = numbers.length === 1;
  viewer.querySelector(".controls").hidden = !all[0].dataset.label;
  viewer.show = () => {
    const shown = ticked(viewer), number = numbers[slider.value];
    for (const run of viewer.querySelectorAll(".run")) {
      run.hidden = !run.dataset.of.split(" ").some(index => shown(Number(index)));
      const pictures = [...run.querySelectorAll("img")], last = pictures.findLast(picture => Number(picture.dataset.number) <= number);
      pictures.forEach(picture => { picture.hidden = picture !== (last ?? pictures[0]); });
    }
    label.textContent = all.find(picture => Number(picture.dataset.number) === number).dataset.label;
    slider.setAttribute("aria-valuetext", label.textContent);
  };
  slider.addEventListener("input", viewer.show);
  viewer.show();
}

// Ticks: charts, pictures and rows of tables show what is ticked.
for (const compare of document.querySelectorAll(".compare")) {
  const chapter = compare.closest(".chapter"), boxes = [...compare.querySelectorAll("input")];
  function apply() {
    const shown = ticked(compare);
    chapter.querySelectorAll(".figure").forEach(draw);
    chapter.querySelectorAll(".viewer").forEach(viewer => viewer.show());
    chapter.querySelectorAll("tr[data-of]").forEach(row => { row.hidden = !shown(Number(row.dataset.of)); });
  }
  compare.addEventListener("change", apply);
  for (const [name, checked] of [["all", true], ["none", false]]) {
    compare.querySelector(`.${name}`).addEventListener("click", () => {
      boxes.forEach(box => { box.checked = checked; });
      apply();
    });
  }
}

// Tables: sorted by the column whose head is pressed, numbers by their value.
function valueOf(row, column) {
  const text = row.cells[column].textContent.trim(), plain = text.replaceAll(",", "").replace("−", "-");
  return /^-?[\d.]/.test(plain) ? parseFloat(plain) : text;
}
function compared(one, other) {
  return typeof one === "number" && typeof other === "number" ? one - other : String(one).localeCompare(String(other), "en", {numeric: true});
}
for (const table of document.querySelectorAll(".wide table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  if (body.rows.length < 2) continue;
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending", rows = [...body.rows];
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const isEmpty = row => ["", "–"].includes(row.cells[column].textContent.trim());
      rows.sort((one, other) => isEmpty(one) - isEmpty(other) ||
        (down ? -1 : 1) * compared(valueOf(one, column), valueOf(other, column)));
      body.append(...rows);
    });
  });
}
