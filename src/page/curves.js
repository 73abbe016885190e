// Curves as SVG.

import { attributes, draw, number, put } from './nodes.js';

// About `most` round numbers between `low` and `high`.
function ticks(low, high, most) {
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  // Multiples of the step: a sum of steps would miss 0 by its rounding.
  for (let count = Math.ceil(low / step); count * step <= high + step * 1e-6; count += 1) found.push(count * step);
  return found.map((tick) => Number(tick.toPrecision(12)));
}

// Ticks of a logarithmic scale: powers of ten, with their doubles and fives where there are few.
function powers(low, high, most) {
  const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const at = (factors, every) => {
    const found = [];
    for (let power = first; power <= last; power += every) found.push(...factors.map((factor) => Number(`${factor}e${power}`)));
    return found.filter((tick) => tick >= low && tick <= high);
  };
  const fine = at([1, 2, 5], 1);
  if (fine.length < 3) return ticks(low, high, most).filter((tick) => tick > 0);
  return fine.length <= most + 2 ? fine : at([1], Math.ceil((last - first) / most));
}

// The line of points that are [x, y] in pixels.
const line = (points) => points.map(([x, y], i) => `${i ? 'L' : 'M'}${x.toFixed(1)} ${y.toFixed(1)}`).join('');

// The place of `x` in `xs`, which ascend: that of the value nearest to it; undefined outside of them.
export function nearest(xs, x) {
  if (!xs.length || x < xs[0] || x > xs.at(-1)) return undefined;
  let [low, high] = [0, xs.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle; else high = middle;
  }
  return x - xs[low] <= xs[high] - x ? low : high;
}

// Curves with axes. Pointer and arrow keys move a cursor along `xs`; `read(i)` says what is there.
export class Plot {
  constructor(parent, name, height) {
    Object.assign(this, { parent, name, height, data: null, at: null, moved: null });
    this.svg = draw('svg', { class: 'plot', height, role: 'slider', tabindex: 0, 'aria-label': name });
    parent.append(this.svg);
    this.svg.addEventListener('pointermove', (event) => this.point(event.clientX));
    for (const name of ['pointerleave', 'blur']) this.svg.addEventListener(name, () => this.move(null));
    this.svg.addEventListener('keydown', (event) => this.step(event));
  }

  // data: { xs, ys, read, told, low?, tick?, log? } of a curve; several have, in place of ys, curves: a list of
  // { xs, ys, kind, mark, raw? }, xs of all being their union. `raw` are values that `ys` smooths.
  show(data) {
    this.data = data;
    if (this.at !== null && this.at >= data.xs.length) this.at = null;
    this.draw();
  }

  move(at) {
    this.at = at;
    this.cursor();
    this.moved?.(at);
  }

  point(clientX) {
    if (!this.places?.length) return;
    const x = clientX - this.svg.getBoundingClientRect().left;
    this.move(nearest(this.places, Math.min(this.places.at(-1), Math.max(this.places[0], x))));
  }

  step(event) {
    const last = (this.data?.xs.length ?? 0) - 1;
    const at = this.at ?? last;
    const next = { ArrowLeft: at - 1, ArrowDown: at - 1, ArrowRight: at + 1, ArrowUp: at + 1, Home: 0, End: last }[event.key];
    if (next === undefined || last < 0) return;
    event.preventDefault();
    this.move(Math.min(last, Math.max(0, next)));
  }

  draw() {
    const { svg, data, height } = this;
    const width = Math.max(svg.clientWidth || this.parent.clientWidth, 120);
    const [left, right, top, bottom] = [56, data.curves ? 24 : 8, 8, 20];
    const { xs, tick = number } = data;
    const curves = data.curves ?? [{ xs, ys: data.ys, kind: '' }];
    const scale = data.log ? Math.log10 : (value) => value;
    const values = curves.flatMap(({ ys, raw }) => (raw ? ys.concat(raw) : ys));
    let high = scale(values.reduce((a, b) => Math.max(a, b)));
    let low = data.low ?? scale(values.reduce((a, b) => Math.min(a, b)));
    // Values that differ by their rounding alone make a flat line.
    const rounding = 1e-9 * (data.log ? 1 : Math.max(Math.abs(low), Math.abs(high)));
    const spread = high - low > rounding ? high - low : 0;
    const room = spread * 0.08 || (data.log ? 0.1 : Math.abs(high) * 0.1) || 1;
    if (data.low === undefined) low -= room;
    high += room;
    const [first, end] = [xs[0], xs.at(-1)];
    const x = (value) => left + (end > first ? (value - first) / (end - first) : 0.5) * (width - left - right);
    const y = (value) => height - bottom - ((scale(value) - low) / (high - low)) * (height - top - bottom);
    this.places = xs.map(x);
    this.frame = { x, y, top, bottom, right: width - right };
    svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
    const parts = [];
    for (const value of data.log ? powers(10 ** low, 10 ** high, 5) : ticks(low, high, 5)) {
      parts.push(draw('line', { class: 'grid', x1: left, x2: width - right, y1: y(value), y2: y(value) }));
      parts.push(draw('text', { x: left - 8, y: y(value) + 4, 'text-anchor': 'end' }, number(value)));
    }
    const whole = ticks(first, end, Math.max(4, Math.floor(width / 90)));
    for (const value of whole.filter((value) => data.tick || Number.isInteger(value))) {
      const anchor = x(value) > width - 30 ? 'end' : 'middle';
      parts.push(draw('text', { x: x(value), y: height - 4, 'text-anchor': anchor }, tick(value)));
    }
    for (const { xs, ys, kind, raw } of curves) {
      const points = (ys) => ys.map((value, i) => [x(xs[i]), y(value)]);
      if (data.low !== undefined && !data.curves && xs.length > 1) {
        const floor = [[x(end), y(low)], [x(first), y(low)]];
        parts.push(draw('path', { class: 'area', d: `${line([...points(ys), ...floor])}Z` }));
      }
      if (raw) parts.push(draw('path', { class: `trace raw ${kind}`, d: line(points(raw)) }));
      parts.push(draw('path', { class: `trace ${kind}`, d: line(points(ys)) }));
    }
    this.above = draw('g');
    svg.replaceChildren(...parts, this.above);
    this.cursor();
  }

  // Draws what moves: the cursor, the points that it is at, and the numbers of curves beside their ends.
  cursor() {
    const { svg, data, at: place, frame: { x, y, top, bottom, right }, height } = this;
    const { xs, read, told } = data;
    const at = place ?? xs.length - 1;
    const parts = [];
    if (place !== null) parts.push(draw('line', { class: 'cursor', x1: x(xs[at]), x2: x(xs[at]), y1: top, y2: height - bottom }));
    const labels = [];
    for (const curve of data.curves ?? [{ xs, ys: data.ys, kind: '' }]) {
      const i = place === null ? curve.xs.length - 1 : nearest(curve.xs, xs[at]);
      if (i !== undefined) parts.push(draw('circle', { class: `mark ${curve.kind}`, cx: x(curve.xs[i]), cy: y(curve.ys[i]), r: 3 }));
      if (curve.mark) labels.push({ y: y(curve.ys.at(-1)) + 4, text: curve.mark, x: Math.min(right, x(curve.xs.at(-1))) + 7 });
    }
    // From top to bottom, none over another that ends beside it.
    const placed = [];
    for (const label of labels.sort((a, b) => a.y - b.y)) {
      for (const other of placed) if (Math.abs(other.x - label.x) < 14) label.y = Math.max(label.y, other.y + 11);
      placed.push(label);
      parts.push(draw('text', { class: 'end', x: label.x, y: label.y }, label.text));
    }
    this.above.replaceChildren(...parts);
    attributes(svg, { 'aria-valuemin': 0, 'aria-valuemax': xs.length - 1, 'aria-valuenow': at, 'aria-valuetext': read(at) });
    if (told) put(told, read(at));
  }
}

// A curve without axes.
export function spark(svg, { steps, values } = { steps: [], values: [] }) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const first = steps[0];
  const x = (step) => 2 + ((step - first) / (steps.at(-1) - first || 1)) * 196;
  const y = (value) => 22 - ((value - low) / (high - low || 1)) * 20;
  const points = steps.map((step, i) => [x(step), y(values[i])]);
  svg.firstChild.setAttribute('d', points.length > 1 ? line(points) : '');
}
