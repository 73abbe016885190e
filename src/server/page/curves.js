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

// The line of points that are [x, y] in pixels.
const line = (points) => points.map(([x, y], i) => `${i ? 'L' : 'M'}${x.toFixed(1)} ${y.toFixed(1)}`).join('');

// A curve with axes. Pointer and arrow keys move a cursor along it; `read(i)` says what is there.
export class Plot {
  constructor(parent, name, height) {
    Object.assign(this, { parent, name, height, data: null, at: null });
    this.svg = draw('svg', { class: 'plot', height, role: 'slider', tabindex: 0, 'aria-label': name });
    parent.append(this.svg);
    this.svg.addEventListener('pointermove', (event) => this.point(event.clientX));
    for (const name of ['pointerleave', 'blur']) this.svg.addEventListener(name, () => this.move(null));
    this.svg.addEventListener('keydown', (event) => this.step(event));
  }

  // data: { xs, ys, read, told, low?, tick? }
  show(data) {
    this.data = data;
    if (this.at !== null && this.at >= data.xs.length) this.at = null;
    this.draw();
  }

  move(at) {
    this.at = at;
    this.draw();
  }

  point(clientX) {
    if (!this.places?.length) return;
    const x = clientX - this.svg.getBoundingClientRect().left;
    const near = this.places.reduce((best, [place], i) => (
      Math.abs(place - x) < Math.abs(this.places[best][0] - x) ? i : best), 0);
    this.move(near);
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
    const [left, right, top, bottom] = [56, 8, 8, 20];
    const { xs, ys, read, told, tick = number } = data;
    const last = xs.length - 1;
    let low = data.low ?? Math.min(...ys);
    let high = Math.max(...ys);
    const room = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
    if (data.low === undefined) low -= room;
    high += room;
    const [first, end] = [xs[0], xs[last]];
    const x = (value) => left + (end > first ? (value - first) / (end - first) : 0.5) * (width - left - right);
    const y = (value) => height - bottom - ((value - low) / (high - low)) * (height - top - bottom);
    this.places = xs.map((value, i) => [x(value), y(ys[i])]);
    svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
    const parts = [];
    for (const value of ticks(low, high, 5)) {
      parts.push(draw('line', { class: 'grid', x1: left, x2: width - right, y1: y(value), y2: y(value) }));
      parts.push(draw('text', { x: left - 8, y: y(value) + 4, 'text-anchor': 'end' }, number(value)));
    }
    const whole = ticks(first, end, Math.max(4, Math.floor(width / 90)));
    for (const value of whole.filter((value) => data.tick || Number.isInteger(value))) {
      const anchor = x(value) > width - 30 ? 'end' : 'middle';
      parts.push(draw('text', { x: x(value), y: height - 4, 'text-anchor': anchor }, tick(value)));
    }
    if (data.low !== undefined && last > 0) {
      const floor = [[x(end), y(low)], [x(first), y(low)]];
      parts.push(draw('path', { class: 'area', d: `${line([...this.places, ...floor])}Z` }));
    }
    parts.push(draw('path', { class: 'trace', d: line(this.places) }));
    const at = this.at ?? last;
    const [markX, markY] = this.places[at];
    if (this.at !== null) parts.push(draw('line', { class: 'cursor', x1: markX, x2: markX, y1: top, y2: height - bottom }));
    parts.push(draw('circle', { class: 'mark', cx: markX, cy: markY, r: 3 }));
    svg.replaceChildren(...parts);
    attributes(svg, { 'aria-valuemin': 0, 'aria-valuemax': last, 'aria-valuenow': at, 'aria-valuetext': read(at) });
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
