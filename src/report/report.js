// Shows the runs in the text of `data`: a table, curves over each other, and tables of phases, traffic and fields.

import { Plot, nearest } from './curves.js';
import { attributes, bytes, compact, count, draw, duration, make, number, put } from './nodes.js';
import { chooseTheme } from './theme.js';

const { runs, made, version } = JSON.parse(document.getElementById('data').textContent);
const $ = (id) => document.getElementById(id);
const view = { scale: 'linear', axis: 'steps', smoothing: 0 };
const HEIGHT = 190;

// Curves in their order: key, name, and how they are shown. `part`: unit ÷ value; `low`: the axis begins there.
const CURVES = [
  ['loss', 'Loss, mean of a target', { log: true, smooth: true }],
  ['eval_loss', 'Evaluation loss', { log: true }],
  ['eval_perplexity', 'Evaluation perplexity', { log: true }],
  ['eval_seconds', 'Seconds of an evaluation', { low: 0 }],
  ['eval_tokens', 'Tokens of an evaluation', { low: 0 }],
  ['lr', 'Learning rate', { log: true }],
  ['grad_norm', 'Gradient norm before clipping', { log: true, smooth: true }],
  ['tokens_per_second', 'Tokens per second', { smooth: true, low: 0 }],
  ['step_seconds', 'Seconds of a step', { smooth: true, low: 0 }],
  ['peak_rss_bytes', 'Memory of the largest rank, peak, GB', { part: 1e9, low: 0 }],
  ['device_memory_bytes', 'Memory in use on a device, GB', { part: 1e9, low: 0 }],
  ['received_bytes', 'Received by rank 0 in a step, MB', { part: 1e6, low: 0 }],
  ['router.max_over_mean', 'Tokens of the busiest expert ÷ mean', { smooth: true }],
  ['router.entropy', 'Entropy of the choice of experts, nats', { smooth: true }],
  ['router.aux_loss', 'Load-balancing loss', { smooth: true }],
];

const AXES = {
  steps: { tell: (step) => `step ${step}` },
  tokens: { tick: (tokens) => compact.format(tokens), tell: (tokens) => `${compact.format(tokens)} tokens` },
  seconds: { tick: (minutes) => `${number(minutes)} min`, tell: (minutes) => `${number(minutes)} min` },
};

runs.forEach((run, i) => {
  run.kind = `kind-${i % 8}${i >= 8 ? ' again' : ''}`;
  run.mark = String(i + 1);
  run.shown = true;
});
const shown = () => runs.filter((run) => run.shown);

// The places and values of a run's curve; a value that is absent, or has no logarithm where one is needed, is left out.
function points(run, key, { log, part = 1 }) {
  const from = key in run.evaluations.curves ? run.evaluations : run;
  const [xs, ys] = [[], []];
  (from.curves[key] ?? []).forEach((value, i) => {
    if (value === null || (log && view.scale === 'log' && value <= 0)) return;
    xs.push(view.axis === 'seconds' ? from.seconds[i] / 60 : from[view.axis][i]);
    ys.push(value / part);
  });
  return { xs, ys };
}

// The exponential moving average, without a pull towards 0 at the start: that of TensorBoard.
function smoothed(values, weight) {
  let [sum, left] = [0, 1];
  return values.map((value) => {
    sum = sum * weight + (1 - weight) * value;
    left *= weight;
    return sum / (1 - left);
  });
}

// --- Curves

class Chart {
  constructor(parent, key, name, how) {
    Object.assign(this, { key, name, how });
    this.now = make('span', { class: 'now' });
    this.values = make('ul', { class: 'values', 'aria-hidden': true });
    this.place = make('div');
    this.figure = make('figure', { 'data-curve': key }, make('figcaption', {}, make('span', {}, name), this.now), this.place, this.values);
    parent.append(this.figure);
    this.plot = new Plot(this.place, name, HEIGHT);
    this.plot.moved = (at) => follow(this, at);
  }

  show() {
    const { how, key } = this;
    this.parts = shown().map((run) => ({ run, ...points(run, key, how) })).filter(({ xs }) => xs.length);
    this.figure.hidden = !this.parts.length;
    if (!this.parts.length) return;
    const xs = [...new Set(this.parts.flatMap((part) => part.xs))].sort((a, b) => a - b);
    const curves = this.parts.map((part) => {
      const is = how.smooth && view.smoothing > 0;
      if (is) part.smooth = smoothed(part.ys, view.smoothing);
      const mark = runs.length > 1 ? part.run.mark : '';
      return { xs: part.xs, ys: part.smooth ?? part.ys, raw: is ? part.ys : undefined, kind: part.run.kind, mark };
    });
    const log = how.log && view.scale === 'log';
    this.plot.at = null;
    this.plot.show({ xs, curves, log, low: log ? undefined : how.low, tick: AXES[view.axis].tick, read: (i) => this.read(i) });
    this.list(null);
  }

  // The value of a run's curve beside place `x`; null: its last.
  value({ xs, ys, smooth }, x) {
    const i = x === null ? xs.length - 1 : nearest(xs, x);
    return i === undefined ? '–' : number((smooth ?? ys)[i]);
  }

  read(i) {
    const x = this.plot.data.xs[i];
    const told = this.parts.map((part) => `${part.run.name} ${this.value(part, x)}`);
    return `${AXES[view.axis].tell(x)}: ${told.join(', ')}`;
  }

  list(x) {
    put(this.now, x === null ? 'last' : AXES[view.axis].tell(x));
    this.values.replaceChildren(...this.parts.map((part) => make('li', {},
      make('span', { class: `key ${part.run.kind}` }, part.run.mark), this.value(part, x))));
  }
}

const charts = [];
let leads = true;

// Brings the cursors of all charts to the place of one.
function follow(chart, at) {
  const x = at === null ? null : chart.plot.data.xs[at];
  chart.list(x);
  if (!leads) return;
  leads = false;
  for (const other of charts) {
    if (other === chart || other.figure.hidden) continue;
    const near = x === null ? null : nearest(other.plot.data.xs, x) ?? null;
    if (near !== other.plot.at) other.plot.move(near);
  }
  leads = true;
}

function showCurves() {
  charts.forEach((chart) => chart.show());
  $('nothing').hidden = charts.some((chart) => !chart.figure.hidden);
  if (charts.length) put($('nothing'), shown().length ? 'No step was made yet.' : 'No run is selected.');
}

function makeCurves() {
  const known = new Set(CURVES.map(([key]) => key));
  const keys = new Set(runs.flatMap((run) => [...Object.keys(run.curves), ...Object.keys(run.evaluations.curves)]));
  const other = [...keys].filter((key) => !known.has(key)).sort().map((key) => [key, key.replaceAll('_', ' '), {}]);
  for (const [key, name, how] of [...CURVES, ...other]) {
    if (keys.has(key)) charts.push(new Chart($('curves'), key, name, how));
  }
  const group = Math.max(...runs.map((run) => run.group), 1);
  $('grouped').hidden = group === 1;
  put($('grouped'), `A point is the mean of up to ${group} lines of metrics.jsonl; evaluations are all there.`);
  $('view').hidden = !charts.length;
}

// --- Tables

function runTable() {
  put($('runs-caption'), runs.length > 1 ? 'Curves of the selected runs are shown; a run has its number and colour everywhere.' : '');
  $('run-rows').replaceChildren(...runs.map((run) => {
    const box = attributes(document.createElement('input'), { type: 'checkbox', checked: '', 'aria-label': `Curves of ${run.name}` });
    box.addEventListener('change', () => {
      run.shown = box.checked;
      showCurves();
      put($('news'), `${run.name} is ${run.shown ? 'shown' : 'hidden'}`);
    });
    const name = make('span', {}, run.name);
    const key = make('span', { class: `key ${run.kind}`, 'aria-hidden': true }, run.mark);
    const state = make('td', {}, run.state);
    if (run.reason) state.append(make('span', { class: 'reason' }, run.reason));
    const step = run.step === null ? '–' : `${run.step}${run.total_steps ? ` of ${run.total_steps}` : ''}`;
    const { best_eval: best } = run;
    const loss = run.loss === null ? '–' : number(run.loss);
    const cell = (text, more = '') => make('td', { class: `number ${more}` }, text);
    const some = run.total_seconds > 0;
    return make('tr', {}, make('th', { scope: 'row' }, make('label', { class: 'choice' }, box, key, name)), state, cell(step), cell(loss),
      cell(best ? `${number(best.loss)} at step ${best.step}` : '–'),
      cell(some ? compact.format(run.total_tokens) : '–', 'wide'),
      cell(some ? number(run.total_tokens / run.total_seconds) : '–', 'wide'),
      cell(some ? duration(run.total_seconds) : '–', 'wide'),
      make('td', { class: 'wide path' }, run.model ?? '–'));
  }));
}

const heads = (first, all) => [make('th', { scope: 'col' }, first), ...all.map((run) => make('th', { scope: 'col' },
  make('span', { class: `key ${run.kind}`, 'aria-hidden': true }, run.mark), ` ${run.name}`))];

// A table with a row for each key of the runs' objects `field`, and bars of the parts of each run's sum.
function shares(name, field, tell, first) {
  const all = runs.filter((run) => Object.keys(run[field]).length);
  $(`${name}-section`).hidden = !all.length;
  const sum = (run) => Object.values(run[field]).reduce((a, b) => a + b, 0);
  const most = new Map();
  for (const run of all) for (const [key, value] of Object.entries(run[field])) most.set(key, Math.max(most.get(key) ?? 0, value));
  const keys = [...most.keys()].sort((a, b) => most.get(b) - most.get(a));
  const tag = name === 'phases' ? 'phase' : name;
  $(`${tag}-head`).replaceChildren(...heads(first, all));
  const cell = (run, key) => {
    const value = run[field][key];
    if (value === undefined) return make('td', { class: 'number' }, '–');
    const part = value / (sum(run) || 1);
    const bar = draw('svg', { 'aria-hidden': true }, draw('rect', { class: 'rail', width: '100%', height: 4, rx: 2 }),
      draw('rect', { class: `level ${run.kind}`, width: `${(100 * part).toFixed(1)}%`, height: 4, rx: 2 }));
    return make('td', { class: 'code' }, `${tell(value)} · ${Math.round(100 * part)} %`, bar);
  };
  const rows = keys.map((key) => make('tr', {}, make('th', { scope: 'row', class: 'code' }, key), ...all.map((run) => cell(run, key))));
  const total = make('tr', { class: 'total' }, make('th', { scope: 'row' }, 'together'), ...all.map((run) => make('td', { class: 'code' }, tell(sum(run)))));
  $(`${tag}-rows`).replaceChildren(...rows, total);
}

function fields() {
  const all = runs.filter((run) => Object.keys(run.config).length);
  $('config-section').hidden = !all.length;
  const keys = [...new Set(all.flatMap((run) => Object.keys(run.config)))];
  const differ = keys.filter((key) => new Set(all.map((run) => run.config[key])).size > 1);
  const row = (key) => make('tr', {}, make('th', { scope: 'row', class: 'code' }, key),
    ...all.map((run) => make('td', { class: 'path' }, run.config[key] ?? '–')));
  put($('config-caption'), all.length > 1 ? `${count(differ.length, 'field')} of ${keys.length} differ.` : `${count(keys.length, 'field')}.`);
  $('config-head').replaceChildren(...(differ.length ? heads('Field', all) : []));
  $('config-rows').replaceChildren(...differ.map(row));
  $('all-head').replaceChildren(...heads('Field', all));
  $('all-rows').replaceChildren(...keys.map(row));
}

// --- The page

function begin() {
  chooseTheme();
  const time = new Date(made * 1000).toISOString().slice(0, 16).replace('T', ' ');
  put($('subject'), `report of ${runs.length === 1 ? runs[0].name : count(runs.length, 'run')}`);
  put($('made'), `Made ${time} UTC by version ${version}`);
  document.title = `${runs.length === 1 ? runs[0].name : count(runs.length, 'run')} · xorl-dist`;
  runTable();
  makeCurves();
  showCurves();
  shares('phases', 'phases', (seconds) => `${number(seconds)} s`, 'Phase');
  shares('received', 'received', bytes, 'Operation and group');
  fields();
  $('view').addEventListener('input', ({ target }) => {
    view[target.name] = target.name === 'smoothing' ? Number(target.value) : target.value;
    put($('smoothing'), view.smoothing);
    showCurves();
  });
  $('view').addEventListener('submit', (event) => event.preventDefault());
  addEventListener('resize', () => charts.forEach((chart) => { if (!chart.figure.hidden) chart.plot.draw(); }));
}

begin();
