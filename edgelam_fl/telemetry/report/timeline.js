// ---- the timeline: a small SVG a row, in seconds; zooming moves all view boxes

const timelines = JSON.parse(document.getElementById("timelines").textContent);
const at = (id) => document.getElementById(id);
const HINT = "Point at a bar to read it. Drag to move; + and \u2212, or the wheel with Ctrl, to zoom.";
const LANES = { forward: [3, 17], backward: [3, 17], step: [3, 17], send: [22, 5] };  // y and height in 30
let shown, view;

function node(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function words(row, [kind, start, seconds, step, micro_batch, peer]) {
  const whom = peer ? (kind === "send" ? ` to ${peer}` : ` for ${peer}`) : "";
  const unit = kind === "step" ? `optimizer step ${step + 1}` : `${kind}${whom}, step ${step + 1}, micro-batch ${micro_batch + 1}`;
  return `${row.node} (${row.role}): ${unit}: ${seconds.toFixed(4)} s from ${start.toFixed(4)} s on`;
}

function lane(row) {
  const picture = node("svg", { preserveAspectRatio: "none", role: "img", "aria-label": `${row.node}, ${row.role}` });
  for (const bar of row.bars) {
    const [y, height] = LANES[bar[0]] || LANES.step;
    const box = node("rect", { class: bar[0], x: bar[1], y, width: bar[2], height });
    box.onpointerover = box.onclick = () => { at("said").textContent = words(row, bar); };
    picture.append(box);
  }
  const who = document.createElement("span"), swatch = document.createElement("span"), whole = document.createElement("div");
  swatch.className = "swatch"; swatch.style.background = `var(${row.color})`;
  const role = document.createElement("small");
  role.textContent = row.role;
  who.className = "who"; who.title = `${row.node}, ${row.role}`; who.append(swatch, row.node, role);
  whole.className = "lane"; whole.append(who, picture);
  return whole;
}

function choose(index) {
  shown = timelines[index];
  at("lanes").replaceChildren(...shown.rows.map(lane));
  [...at("shares").children].forEach((table, i) => { table.hidden = i !== index; });
  at("said").textContent = HINT;
  look(shown.start, shown.end);
}

function look(from, to) {
  const all = shown.end - shown.start, width = Math.min(Math.max(to - from, all / 2000), all) || 1;
  const left = Math.max(shown.start, Math.min(from, shown.end - width));
  view = [left, left + width];
  for (const picture of at("lanes").querySelectorAll("svg")) picture.setAttribute("viewBox", `${left} 0 ${width} 30`);
  const most = Math.max(2, Math.floor(at("axis").clientWidth / 90)), rough = width / most, ten = 10 ** Math.floor(Math.log10(rough));
  const every = [1, 2, 5, 10].map((n) => n * ten).find((n) => n >= rough), digits = Math.min(9, Math.max(0, -Math.floor(Math.log10(every))));
  at("axis").replaceChildren();
  for (let i = Math.ceil(left / every); i * every <= left + width; i++) {
    const tick = document.createElement("span"), place = (i * every - left) / width;
    tick.textContent = `${(i * every).toFixed(digits)} s`; tick.style.left = `${100 * place}%`;
    if (place < 0.03) tick.style.transform = "none";
    if (place > 0.96) tick.style.transform = "translateX(-100%)";
    at("axis").append(tick);
  }
}

function zoom(factor, middle = 0.5) {
  const [from, to] = view, still = from + middle * (to - from);
  look(still - (still - from) * factor, still + (to - still) * factor);
}

const move = (share) => look(view[0] + share * (view[1] - view[0]), view[1] + share * (view[1] - view[0]));

if (timelines.length) {
  const lanes = at("lanes");
  let held = null;
  at("round").onchange = () => choose(at("round").selectedIndex);
  at("in").onclick = () => zoom(0.5);
  at("out").onclick = () => zoom(2);
  at("all").onclick = () => look(shown.start, shown.end);
  lanes.onpointerdown = (event) => { held = event.clientX; };
  window.addEventListener("pointerup", () => { held = null; });
  window.addEventListener("pointercancel", () => { held = null; });
  window.addEventListener("pointermove", (event) => {
    if (held === null) return;
    move((held - event.clientX) / at("axis").clientWidth);
    held = event.clientX;
  });
  lanes.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    const place = at("axis").getBoundingClientRect();
    zoom(event.deltaY > 0 ? 1.25 : 0.8, Math.min(1, Math.max(0, (event.clientX - place.left) / place.width)));
  }, { passive: false });
  lanes.onkeydown = ({ key }) => {
    const does = { "+": () => zoom(0.5), "-": () => zoom(2), ArrowLeft: () => move(-0.2), ArrowRight: () => move(0.2) }[key];
    if (does) does();
  };
  window.addEventListener("resize", () => look(...view));
  at("round").selectedIndex = timelines.length - 1;
  choose(timelines.length - 1);
}
