// The page of a matrix: buttons that hide lines and rows by their values of the axes, and tables that sort by their columns.
const off = new Set([...document.querySelectorAll(".chips .off")].map((button) => button.dataset.key));
const buttons = [...document.querySelectorAll(".chips button")];
const shows = (keys) => Object.entries(keys).every(([axis, value]) => !off.has(`${axis}=${value}`));

function apply() {
  for (const button of buttons) {
    button.classList.toggle("off", off.has(button.dataset.key));
    button.setAttribute("aria-pressed", String(!off.has(button.dataset.key)));
  }
  for (const row of document.querySelectorAll("tr[data-keys]")) row.hidden = !shows(JSON.parse(row.dataset.keys));
  charts.keep((item) => !item.keys || shows(item.keys));
}

for (const button of buttons) {
  const key = button.dataset.key, axis = key.slice(0, key.indexOf("=") + 1);
  button.onclick = () => { if (!off.delete(key)) off.add(key); apply(); };
  button.ondblclick = () => {
    for (const other of buttons) if (other.dataset.key.startsWith(axis)) off.add(other.dataset.key);
    off.delete(key);
    apply();
  };
}
if (buttons.length) apply();

for (const table of document.querySelectorAll("table.sorts")) {
  [...table.rows[0].cells].forEach((head, column) => {
    let upwards = false;
    head.onclick = () => {
      upwards = !upwards;
      const value = (row) => row.cells[column].dataset.v, sign = upwards ? 1 : -1;
      const rows = [...table.rows].slice(1).sort((a, b) => sign * value(a).localeCompare(value(b), "en", { numeric: false }) || 0);
      const numbers = rows.every((row) => value(row) !== "" && !Number.isNaN(Number(value(row))));
      if (numbers) rows.sort((a, b) => sign * (Number(value(a)) - Number(value(b))));
      rows[0].parentNode.append(...rows);
      for (const other of table.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", upwards ? "ascending" : "descending");
    };
  });
}
