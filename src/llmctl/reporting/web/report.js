"use strict";
const curves = JSON.parse(document.getElementById("curves").textContent);
const place = (data, x) => curves.left + ((x - data.x[0]) / (data.x[1] - data.x[0])) * curves.width;

function nearest(points, x) {
  let low = 0;
  let high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle;
    else high = middle;
  }
  return Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? low : high;
}

for (const figure of document.querySelectorAll("[data-chart]")) {
  const data = curves.charts[Number(figure.dataset.chart)];
  const frame = figure.querySelector("svg");
  const cursor = figure.querySelector(".cursor");
  const said = figure.querySelector(".at");
  const buttons = [...figure.querySelectorAll(".legend button")];
  const groups = [...figure.querySelectorAll(".series")];
  const values = buttons.map((button) => button.querySelector("b"));
  const last = values.map((value) => value.textContent);

  buttons.forEach((button, number) => {
    button.addEventListener("click", () => {
      const off = button.getAttribute("aria-pressed") === "true";
      button.setAttribute("aria-pressed", String(!off));
      groups[number].classList.toggle("off", off);
    });
  });

  const leave = () => {
    cursor.classList.remove("on");
    said.textContent = "";
    values.forEach((value, number) => { value.textContent = last[number]; });
  };
  frame.addEventListener("pointerleave", leave);
  frame.addEventListener("pointermove", (event) => {
    const box = frame.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * frame.viewBox.baseVal.width;
    const share = Math.min(1, Math.max(0, (at - curves.left) / curves.width));
    const wanted = data.x[0] + share * (data.x[1] - data.x[0]);
    const places = data.series.map((one) => nearest(one.points, wanted));
    const xs = data.series.map((one, number) => one.points[places[number]][0]);
    const x = xs.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
    cursor.classList.add("on");
    cursor.setAttribute("x1", place(data, x));
    cursor.setAttribute("x2", place(data, x));
    said.textContent = `step ${x.toLocaleString("en")}`;
    values.forEach((value, number) => {
      value.textContent = data.series[number].texts[places[number]];
    });
  });
}
