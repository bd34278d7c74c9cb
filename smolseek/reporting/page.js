// The theme button, and what a chart says at the pointer: its numbers are read from the table under it.
const dark = matchMedia("(prefers-color-scheme: dark)");
document.getElementById("theme").addEventListener("click", () => {
  const shown = document.documentElement.dataset.theme || (dark.matches ? "dark" : "light");
  document.documentElement.dataset.theme = shown === "dark" ? "light" : "dark";
});

const number = (cell) => Number(cell.textContent.replaceAll(",", ""));
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// Calls show(x, y) with the pointer's place in 0..1, step(right, up) for arrow keys, and hide() when it leaves.
function follow(plot, show, step, hide) {
  const place = (event) => {
    const box = plot.getBoundingClientRect();
    const share = (value) => clamp(value, 0, 0.9999);
    show(share((event.clientX - box.left) / box.width), share((event.clientY - box.top) / box.height));
  };
  plot.addEventListener("pointermove", place);
  plot.addEventListener("pointerdown", place);
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const right = { ArrowLeft: -1, ArrowRight: 1 }[event.key] || 0;
    const up = { ArrowDown: -1, ArrowUp: 1 }[event.key] || 0;
    if (right || up) {
      event.preventDefault();
      step(right, up);
    }
  });
}

function lines(chart) {
  const [head, ...rows] = chart.querySelector("table").rows;
  const plot = chart.querySelector(".plot"), cross = chart.querySelector(".cross");
  const outputs = [...chart.querySelectorAll(".legend output")], at = chart.querySelector(".at");
  const xs = rows.map((row) => number(row.cells[0]));
  const low = Number(plot.dataset.low), high = Number(plot.dataset.high);
  const before = [at.textContent, ...outputs.map((output) => output.textContent)];
  let row = rows.length - 1;
  const nearest = (wanted, column) => {
    let best = null;
    rows.forEach((candidate, index) => {
      if (column && !candidate.cells[column].textContent) return;
      if (best === null || Math.abs(xs[index] - wanted) < Math.abs(xs[best] - wanted)) best = index;
    });
    return best;
  };
  const tell = () => {
    at.textContent = `${head.cells[0].textContent} ${rows[row].cells[0].textContent}`;
    outputs.forEach((output, index) => {
      output.textContent = rows[nearest(xs[row], index + 1)].cells[index + 1].textContent;
    });
    cross.style.left = `${(100 * (xs[row] - low)) / (high - low)}%`;
    cross.style.display = "block";
  };
  follow(
    plot,
    (x) => { row = nearest(low + x * (high - low)); tell(); },
    (right) => { row = clamp(row + right, 0, rows.length - 1); tell(); },
    () => {
      cross.style.display = "none";
      [at, ...outputs].forEach((output, index) => { output.textContent = before[index]; });
    },
  );
}

function heat(chart) {
  const readout = chart.querySelector(".readout"), before = readout.textContent;
  const tables = chart.querySelectorAll("table");
  chart.querySelectorAll(".plot").forEach((plot, index) => {
    const [head, ...rows] = tables[index].rows, columns = head.cells.length - 1;
    const cross = plot.querySelector(".cross"), name = tables[index].caption.textContent;
    let column = columns - 1, row = 0;
    const tell = () => {
      const step = head.cells[column + 1].textContent, load = rows[row].cells[column + 1].textContent;
      readout.textContent = `${name}, step ${step}, expert ${row}: ${load} times its fair share`;
      Object.assign(cross.style, {
        display: "block", left: `${(100 * column) / columns}%`, width: `${100 / columns}%`,
        bottom: `${(100 * row) / rows.length}%`, height: `${100 / rows.length}%`,
      });
    };
    follow(
      plot,
      (x, y) => { column = Math.floor(x * columns); row = rows.length - 1 - Math.floor(y * rows.length); tell(); },
      (right, up) => {
        column = clamp(column + right, 0, columns - 1);
        row = clamp(row + up, 0, rows.length - 1);
        tell();
      },
      () => { cross.style.display = "none"; readout.textContent = before; },
    );
  });
}

document.querySelectorAll(".chart").forEach((chart) => (chart.classList.contains("heat") ? heat : lines)(chart));
