// Draws figures as SVG: lines with bands, stacked bars, points with whiskers. Colours are names of CSS variables, so that the light
// and the dark page need no second drawing. Names are plain text. Knows nothing of runs.
"use strict";
const charts = (() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const hidden = {};  // per figure, the names that its legend switched off
  let kept = () => true;  // which lines and points all figures show
  const PAD = { top: 26, right: 14, bottom: 44 }, LETTER = 7.3, DASHES = ["", "7 4", "2 3", "10 3 2 3"];
  const SHAPES = ["circle", "square", "diamond", "triangle"];

  function node(name, attributes, ...children) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function element(name, className, ...children) {
    const made = document.createElement(name);
    made.className = className;
    made.append(...children);
    return made;
  }

  const number = (value, digits = 6) => value.toLocaleString("en", { maximumSignificantDigits: digits });
  const value = (figure, y) => figure.share ? `${number(100 * y, 4)} %` : number(y, 5);
  const isNumber = (y) => typeof y === "number";

  // ---- scales: a function from values to pixels, with its ticks

  function linear(low, high, from, to, most, whole) {
    const rough = Math.max((high - low) / most, whole ? 1 : 0), ten = 10 ** Math.floor(Math.log10(rough || 1));
    const step = [1, 2, 2.5, 5, 10].map((n) => n * ten).find((n) => n >= rough * 0.999 && (!whole || Number.isInteger(n))) || ten;
    const ticks = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high * (1 + 1e-9) + 1e-12; i++) ticks.push(+(i * step).toPrecision(12));
    return Object.assign((v) => from + (v - low) / (high - low || 1) * (to - from), { ticks });
  }

  function logarithmic(low, high, from, to, most) {
    const a = Math.log10(low), b = Math.log10(high), decades = b - a, every = Math.max(1, Math.ceil(decades / most));
    const steps = decades > 3 ? [1] : decades > 1.2 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 8];
    const ticks = [];
    for (let e = Math.floor(a); e <= Math.ceil(b); e += every)
      for (const n of steps) if (n * 10 ** e >= low * 0.999 && n * 10 ** e <= high * 1.001) ticks.push(n * 10 ** e);
    return Object.assign((v) => from + (Math.log10(v) - a) / (b - a || 1) * (to - from), { ticks });
  }

  const isLog = (values, asked, from) => asked && Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) > from;

  function yScale(figure, values, height) {
    const ends = [height - PAD.bottom, PAD.top];
    const most = Math.max(3, Math.floor((height - PAD.top - PAD.bottom) / 44));
    if (isLog(values, figure.log_y, 30)) return logarithmic(Math.min(...values) / 1.1, Math.max(...values) * 1.1, ...ends, most);
    let low = Math.min(...values), high = Math.max(...values);
    if (figure.bars || (low > 0 && low < 0.4 * high)) low = 0;
    const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    high += room;
    if (low !== 0) low -= room;
    if (figure.share) [low, high] = [Math.max(0, low), Math.min(1, high)];
    return linear(low, high, ...ends, most);
  }

  function xScale(figure, values, left, width) {
    const ends = [left + 4, width - PAD.right - 4], most = Math.max(2, Math.floor((width - left) / 70));
    const positive = values.filter((x) => x > 0);
    if (positive.length && isLog(positive, figure.log_x, 10)) {
      return logarithmic(Math.min(...positive) / 1.15, Math.max(...positive) * 1.15, ...ends, most);
    }
    let low = Math.min(...values), high = Math.max(...values);
    if (low === high) [low, high] = [low - 0.5, high + 0.5];
    return linear(low, high, ...ends, most, figure.whole);
  }

  // ---- drawing

  function draw(id) {
    const place = document.getElementById(id), figure = figures[id];
    if (!place || !figure) return;
    const off = hidden[id] ||= new Set(), stays = (item) => !off.has(item.name) && kept(item);
    const lines = (figure.lines || []).filter(stays), bars = (figure.bars || []).filter(stays);
    const points = (figure.points || []).filter(stays);
    const picture = node("svg", { role: "img", "aria-label": `${figure.y} over ${figure.x}` });
    const tip = element("div", "tip");
    tip.hidden = true;
    place.replaceChildren(...legend(id, figure, off), picture, tip);
    const width = place.clientWidth, height = picture.getBoundingClientRect().height || 280;
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const stacks = (bars[0]?.x || []).map((_, i) => bars.reduce((sum, bar) => sum + (bar.y[i] || 0), 0));
    const ys = [...lines.flatMap((l) => [...l.y, ...(l.low || []), ...(l.high || [])]), ...stacks, ...(figure.references || []).map((r) => r.y),
      ...points.flatMap((p) => [p.y, p.low, p.high])].filter(isNumber);
    if (!ys.length) { picture.append(node("text", { x: 8, y: 40 }, "nothing to show")); return; }
    const y = yScale(figure, ys, height);
    const left = 14 + LETTER * Math.max(...y.ticks.map((tick) => value(figure, tick).length));
    const xs = bars.length ? [] : [...lines.flatMap((l) => l.x), ...points.map((p) => p.x)].filter(isNumber);
    const x = bars.length ? bands(bars[0].x, left, width) : xScale(figure, xs, left, width);
    axes(picture, figure, x, y, left, width, height);
    for (const mark of figure.marks || []) picture.append(node("line", { class: "mark", x1: x(mark), x2: x(mark), y1: PAD.top, y2: height - PAD.bottom }));
    references(picture, figure, y, left, width);
    for (const line of lines) drawLine(picture, line, x, y, figure);
    drawBars(picture, bars, x, y);
    drawPoints(picture, points, x, y, width, figure.front);
    follow(place, picture, tip, figure, lines.filter((line) => !line.faint), bars, points, x, y, height);
  }

  function axes(picture, figure, x, y, left, width, height) {
    for (const tick of y.ticks) {
      picture.append(node("line", { class: "grid", x1: left, x2: width - PAD.right, y1: y(tick), y2: y(tick) }),
        node("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, value(figure, tick)));
    }
    const bottom = height - PAD.bottom, every = x.step ? Math.ceil(x.names.length * 56 / (width - left)) : 1;
    picture.append(node("line", { class: "axis", x1: left, x2: width - PAD.right, y1: bottom, y2: bottom }));
    (x.names || x.ticks).forEach((tick, i) => {
      if (i % every) return;
      const at = x.names ? x(i) + x.step / 2 : x(tick);
      picture.append(node("text", { x: at, y: bottom + 18, "text-anchor": "middle" }, x.names ? tick : number(tick)));
    });
    picture.append(node("text", { x: 2, y: 13 }, figure.y),
      node("text", { x: (left + width - PAD.right) / 2, y: height - 6, "text-anchor": "middle" }, figure.x));
  }

  function bands(names, left, width) {
    const step = (width - PAD.right - left) / names.length;
    return Object.assign((i) => left + i * step, { names, step });
  }

  function references(picture, figure, y, left, width) {
    let above = -Infinity;
    for (const reference of [...(figure.references || [])].sort((a, b) => b.y - a.y)) {
      const at = y(reference.y), text = Math.max(at - 5, above + 15);  // one label below the other where lines are close
      above = text;
      picture.append(node("line", { class: "mark", x1: left, x2: width - PAD.right, y1: at, y2: at }),
        node("text", { class: "small", x: width - PAD.right - 2, y: text, "text-anchor": "end" }, reference.text));
    }
  }

  const places = (line, x, y, ys = line.y) => line.x.map((at, i) => isNumber(ys[i]) && Number.isFinite(x(at)) ? [x(at), y(ys[i])] : null);

  function path(found) {
    let text = "", pen = "M";
    for (const point of found) {
      if (point) text += `${pen}${point[0].toFixed(1)} ${point[1].toFixed(1)}`;
      pen = point ? "L" : "M";
    }
    return text;
  }

  function drawLine(picture, line, x, y, figure) {
    const found = places(line, x, y), style = `stroke: var(${line.color}); fill: var(${line.color})`;
    if (line.low) {
      const lows = places(line, x, y, line.low), highs = places(line, x, y, line.high), known = lows.map((point, i) => point && highs[i]);
      const low = lows.filter((_, i) => known[i]), high = highs.filter((_, i) => known[i]);
      if (low.length > 1) picture.append(node("path", { class: "band", style, d: `${path(high)}${path(low.reverse()).replace("M", "L")}Z` }));
    }
    const single = found.filter(Boolean).length < 2;
    picture.append(node("path", { class: `line${line.faint ? " faint" : ""}${line.strong ? " strong" : ""}`, style, d: path(found),
      "stroke-dasharray": DASHES[line.dash || 0] }));
    if ((figure.dots && !line.faint) || single)
      for (const point of found) if (point) picture.append(node("circle", { class: "dot", style, cx: point[0], cy: point[1], r: single || line.strong ? 3.5 : 2.5 }));
  }

  function drawBars(picture, bars, x, y) {
    if (!bars.length) return;
    const wide = Math.max(0, Math.min(x.step * 0.65, 90)), tops = bars[0].x.map(() => 0);
    for (const bar of bars) bar.y.forEach((height, i) => {
      if (!height) return;
      picture.append(node("rect", { style: `fill: var(${bar.color})`, x: x(i) + (x.step - wide) / 2, width: wide,
        y: y(tops[i] + height), height: Math.max(0, y(tops[i]) - y(tops[i] + height)) }));
      tops[i] += height;
    });
  }

  // which points no other point beats in both directions: fewer to the left, and more (or less) of what counts
  function unbeaten(points, best) {
    const sign = best === "min" ? -1 : 1;
    return points.filter((p) => !points.some((q) => q.x <= p.x && sign * q.y >= sign * p.y && (q.x < p.x || sign * q.y > sign * p.y)));
  }

  function drawPoints(picture, points, x, y, width, best) {
    const front = best ? unbeaten(points, best).sort((a, b) => a.x - b.x) : [];
    const labels = [];  // places of the names so far, so that none is printed over another
    if (front.length > 1) picture.append(node("path", { class: "front", d: path(front.map((point) => [x(point.x), y(point.y)])) }));
    for (const point of points) {
      const [a, b] = [x(point.x), y(point.y)], style = `fill: var(${point.color}); stroke: var(${point.color})`;
      if (isNumber(point.low)) picture.append(node("line", { class: "whisker", style, x1: a, x2: a, y1: y(point.low), y2: y(point.high) }));
      picture.append(shape(SHAPES[(point.shape || 0) % 4], a, b, front.includes(point) ? 6 : 4.5, style));
      const right = a > width * 0.75, wide = LETTER * point.name.length;
      if (!front.includes(point)) continue;
      let at = b - 8;
      while (labels.some(([x0, y0, w]) => Math.abs(y0 - at) < 14 && x0 < a + wide && a < x0 + w)) at += 14;
      labels.push([a, at, wide]);
      picture.append(node("text", { class: "small", x: a + (right ? -10 : 10), y: at, "text-anchor": right ? "end" : "start" }, point.name));
    }
  }

  function shape(kind, a, b, r, style) {
    if (kind === "circle") return node("circle", { class: "dot", style, cx: a, cy: b, r });
    const corners = { square: [[-1, -1], [1, -1], [1, 1], [-1, 1]], diamond: [[0, -1.4], [1.4, 0], [0, 1.4], [-1.4, 0]], triangle: [[0, -1.3], [1.2, 0.9], [-1.2, 0.9]] };
    return node("polygon", { class: "dot", style, points: corners[kind].map(([dx, dy]) => `${a + 0.9 * r * dx},${b + 0.9 * r * dy}`).join(" ") });
  }

  // ---- legend, pointer, files

  function legend(id, figure, off) {
    const named = [...(figure.lines || []), ...(figure.bars || [])].filter((item) => !item.faint);
    if (figure.legend === false || named.length < 2) return [];
    const items = named.map((item) => {
      const swatch = element("span", "swatch");
      swatch.style.background = `var(${item.color})`;
      const button = element("button", off.has(item.name) ? "off" : "", swatch, item.name);
      button.setAttribute("aria-pressed", String(!off.has(item.name)));
      button.onclick = () => { if (!off.delete(item.name)) off.add(item.name); draw(id); };
      return button;
    });
    return [element("div", "legend", ...items)];
  }

  function follow(place, picture, tip, figure, lines, bars, points, x, y, height) {
    const cursor = node("line", { class: "cursor", y1: PAD.top, y2: height - PAD.bottom, visibility: "hidden" });
    picture.append(cursor);
    const columns = bars.length ? bars[0].x.map((_, i) => i) : [...new Set(lines.flatMap((line) => line.x))].filter((at) => Number.isFinite(x(at)));
    const near = (items, distance) => items.reduce((best, item) => distance(item) < distance(best) ? item : best, items[0]);

    function rowsAt(px, py) {
      if (points.length) {
        const point = near(points, (p) => Math.hypot(x(p.x) - px, y(p.y) - py));
        return { at: x(point.x), rows: [["", point.name, point.color], [figure.x, number(point.x)], [figure.y, value(figure, point.y)]] };
      }
      if (figure.own_x) {
        const all = lines.flatMap((line) => line.x.map((at, i) => ({ line, at, y: line.y[i] }))).filter((p) => isNumber(p.y) && Number.isFinite(x(p.at)));
        if (!all.length) return null;
        const one = near(all, (p) => Math.hypot(x(p.at) - px, y(p.y) - py));
        return { at: x(one.at), rows: [["", one.line.name, one.line.color], [figure.x, number(one.at)], [figure.y, value(figure, one.y)]] };
      }
      if (!columns.length) return null;
      const middle = bars.length ? x.step / 2 : 0, column = near(columns, (at) => Math.abs(x(at) + middle - px));
      const title = bars.length ? `${figure.x} ${bars[0].x[column]}` : `${figure.x} ${number(column)}`;
      const shown = bars.length ? bars.map((bar) => [bar.name, value(figure, bar.y[column] || 0), bar.color])
        : lines.map((line) => [line.name, line.y[line.x.indexOf(column)], line.color]).filter(([, found]) => isNumber(found))
          .map(([name, found, color]) => [name, value(figure, found), color]);
      const more = shown.length > 14 ? [["", `and ${shown.length - 14} more`]] : [];
      return { at: x(column) + middle, rows: [["", title], ...shown.slice(0, 14), ...more] };
    }

    function show(event) {
      const box = picture.getBoundingClientRect(), found = rowsAt(event.clientX - box.left, event.clientY - box.top);
      if (!found) return;
      cursor.setAttribute("x1", found.at);
      cursor.setAttribute("x2", found.at);
      cursor.setAttribute("visibility", "visible");
      tip.replaceChildren(...found.rows.map(([name, text, color]) => {
        const swatch = element("span", "swatch");
        if (color) swatch.style.background = `var(${color})`;
        return element("div", "", ...(color ? [swatch] : []), name ? `${name}  ` : "", element("b", "", text));
      }));
      tip.hidden = false;
      const right = found.at > box.width / 2;
      tip.style.left = right ? "" : `${found.at + 12}px`;
      tip.style.right = right ? `${place.clientWidth - found.at + 12}px` : "";
      tip.style.top = `${picture.offsetTop + PAD.top}px`;
    }

    const leave = () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); };
    picture.onpointermove = picture.onpointerdown = show;
    picture.onpointerleave = leave;
  }

  const quoted = (text) => /[",\n]/.test(text) ? `"${String(text).replaceAll('"', '""')}"` : String(text);

  function csv(figure) {
    const rows = [["series", figure.x, figure.y]];
    for (const item of [...(figure.lines || []), ...(figure.bars || [])])
      item.x.forEach((at, i) => rows.push([item.faint ? `${item.name} (each step)` : item.name, at, item.y[i] ?? ""]));
    for (const point of figure.points || []) rows.push([point.name, point.x, point.y]);
    return rows.map((row) => row.map(quoted).join(",")).join("\n") + "\n";
  }

  function offer(id) {
    const card = document.getElementById(id)?.closest("figure");
    if (!card) return;
    const button = element("button", "save", "CSV");
    button.title = "Save the numbers of this figure";
    button.onclick = () => {
      const link = element("a", "");
      link.href = URL.createObjectURL(new Blob([csv(figures[id])], { type: "text/csv" }));
      link.download = `${id}.csv`;
      link.click();
    };
    card.append(button);
  }

  function drawAll() {
    for (const id of Object.keys(figures)) draw(id);
  }

  Object.keys(figures).forEach(offer);
  let width = 0;
  new ResizeObserver(() => { if (width !== innerWidth) { width = innerWidth; drawAll(); } }).observe(document.body);
  drawAll();
  return { keep(test) { kept = test; drawAll(); }, draw: drawAll };
})();
