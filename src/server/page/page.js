// Shows what `GET /api/v1/overview` says, every two seconds while somebody looks. Addresses are relative, so that a
// proxy may serve the page below a path of its own. Nodes are made once and changed in place: focus and selection stay.

import { Plot, spark } from './curves.js';
import { ago, bytes, compact, count, draw, duration, keyed, make, number, plain, put } from './nodes.js';
import { chooseTheme, keep, recalled } from './theme.js';
import { Trial } from './try.js';

const POLL = 2000;          // milliseconds between two overviews
const POLL_SLOW = 10000;    // the same while the server does not answer, and between lists of checkpoints
const MOST_RANKS = 8;       // ranks that have a bar of their own
const MOST_POINTS = 240;    // points of the throughput's curve
const TABLE_POINTS = 20;    // rows of the table of values
const CHECKPOINTS = 100;    // checkpoints in the list

const $ = (id) => document.getElementById(id);
const state = { key: recalled('sessionStorage', 'xorl-key'), selected: null, overview: null, failures: 0, lists: 0 };

// Tells screen readers what has changed, in passing.
function announce(text) {
  put($('news'), text);
}

// --- Calls

class Refused extends Error {}

// The response to a call that is in order.
async function ask(path, body, signal) {
  const headers = state.key ? { 'X-API-Key': state.key } : {};
  if (body) headers['Content-Type'] = 'application/json';
  const response = await fetch(path, {
    method: body ? 'POST' : 'GET',
    headers,
    body: body && JSON.stringify(body),
    cache: 'no-store',
    signal: signal ?? AbortSignal.timeout(POLL_SLOW),
  });
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  const reason = answer.detail ?? answer.error?.message ?? `status ${response.status}`;
  if (response.status === 401) {
    askForKey();
    throw new Refused(reason);
  }
  throw new Error(reason);
}

async function call(path) {
  return (await ask(path)).json();
}

function askForKey() {
  $('key-button').hidden = false;
  if (state.key) put($('key-error'), 'The server does not know this key.');
  health('waiting', 'A key is needed');
  if (!$('key-dialog').open) $('key-dialog').showModal();
}

// --- Curves

const plots = new Map();

// Makes the plot of a name once, and gives it data.
function plot(parent, name, height, data) {
  if (!plots.has(parent)) plots.set(parent, new Plot(parent, name, height));
  plots.get(parent).show(data);
}

function throughput({ interval, tokens_per_second: rates }) {
  const recent = rates.slice(-60 / interval);
  const mean = recent.reduce((sum, rate) => sum + rate, 0) / recent.length;
  put($('rate'), recent.length ? plain.format(mean >= 100 ? Math.round(mean) : mean) : '–');
  const group = Math.ceil(rates.length / MOST_POINTS);
  const [xs, ys] = [[], []];
  // Groups are counted from now, so that the first may be a smaller one.
  for (let end = rates.length; end > 0; end -= group) {
    const part = rates.slice(Math.max(0, end - group), end);
    ys.unshift(part.reduce((sum, rate) => sum + rate, 0) / part.length);
    xs.unshift(((end - rates.length) * interval) / 60);
  }
  if (!xs.length) return;
  const tick = (minutes) => (minutes === 0 ? 'now' : `${number(minutes)} min`.replace('-', '−'));
  const read = (i) => `${number(ys[i])} tokens/s, ${tick(Number(xs[i].toFixed(1)))}`;
  plot($('throughput-chart'), 'Throughput over time', 150, { xs, ys, read, low: 0, tick });
}

const NAMES = {
  loss: 'Loss, mean of a target',
  reward: 'Reward',
  entropy_sample: 'Entropy of the samples',
  icepop_maskfrac: 'Fraction masked by IcePop',
  kl_ref: 'KL to the reference',
  kl_sample_train_k3: 'KL of sampler and trainer',
  pg_clipfrac: 'Fraction clipped',
  ratio_mean: 'Ratio of policies',
  tis_clipfrac: 'Fraction truncated',
  tis_mean: 'Truncated ratio',
  grad_norm: 'Gradient norm',
  learning_rate: 'Learning rate',
};
const nameOf = (curve) => NAMES[curve] ?? curve.replaceAll('_', ' ');

// Loss and reward first, the numbers of the optimizer last.
function order(names) {
  const place = (name) => ({ loss: 0, reward: 1, grad_norm: 3, learning_rate: 4 })[name] ?? 2;
  return [...names].sort((a, b) => place(a) - place(b) || a.localeCompare(b));
}

function detail(adapter) {
  const names = adapter ? order(Object.keys(adapter.curves)) : [];
  $('detail').hidden = !adapter;
  if (!adapter) return;
  const { model_id: id, accumulated: passes } = adapter;
  put($('detail-title'), id);
  const since = passes ? `${count(passes, 'pass', 'passes')} since its last update.` : '';
  put($('detail-note'), names.length ? since : `Its curves begin with its next update. ${since}`);
  const create = (name) => make('figure', {},
    make('figcaption', {}, make('span', {}, nameOf(name)), make('span', { class: 'now' })));
  keyed($('curves'), names, (name) => `${adapter.model_id} ${name}`, create, (figure, name) => {
    const { steps, values } = adapter.curves[name];
    figure.classList.toggle('first', name === names[0]);
    const read = (i) => `${number(values[i])} at update ${steps[i]}`;
    const told = figure.querySelector('.now');
    plot(figure, `${nameOf(name)} of ${adapter.model_id}`, 150, { xs: steps, ys: values, read, told });
  });
  for (const parent of plots.keys()) if (!parent.isConnected) plots.delete(parent);
  const heads = ['Update', ...names.map(nameOf)];
  keyed($('value-head'), heads, (name) => name, (name) => make('th', { scope: 'col', class: 'number' }, name), () => {});
  const steps = new Set(names.flatMap((name) => adapter.curves[name].steps));
  const rows = [...steps].sort((a, b) => b - a).slice(0, TABLE_POINTS);
  const cell = (name, step) => {
    const at = adapter.curves[name].steps.indexOf(step);
    return make('td', { class: 'number' }, at < 0 ? '' : number(adapter.curves[name].values[at]));
  };
  const row = (step) => [make('th', { scope: 'row', class: 'number code' }, String(step)), ...names.map((name) => cell(name, step))];
  keyed($('value-rows'), rows, (step) => step, () => make('tr'), (node, step) => node.replaceChildren(...row(step)));
}

// --- Parts of the page

function health(mark, text) {
  const node = $('health');
  if (node.textContent !== text && node.dataset.state !== 'waiting') announce(text);
  node.dataset.state = mark;
  put(node, text);
}

function adapters({ adapters: all, adapter_count: total, lost, time }) {
  const shown = [...all].sort((a, b) => a.model_id.localeCompare(b.model_id, 'en', { numeric: true }));
  if (!shown.some((adapter) => adapter.model_id === state.selected)) state.selected = all[0]?.model_id ?? null;
  const more = total > all.length ? ` The ${all.length} that were used last of ${total}.` : '';
  put($('adapters-caption'), total ? `Select a name to see its curves.${more}` : 'No client has made an adapter yet.');
  const create = () => make('tr', {},
    make('th', { scope: 'row' }, make('button', { type: 'button', class: 'pick' })),
    make('td', { class: 'number' }), make('td', { class: 'number' }),
    make('td', { class: 'spark' }, draw('svg', { viewBox: '0 0 200 24', preserveAspectRatio: 'none', 'aria-hidden': true },
      draw('path', { class: 'trace', 'vector-effect': 'non-scaling-stroke' }))),
    make('td', { class: 'number wide' }), make('td', { class: 'number wide' }),
    make('td', { class: 'wide' }), make('td', { class: 'wide' }));
  keyed($('adapter-rows'), shown, (adapter) => adapter.model_id, create, (row, adapter) => {
    const [name, updates, loss, course, tokens, shape, place, last] = row.children;
    const pick = name.firstChild;
    put(pick, adapter.model_id);
    pick.setAttribute('aria-pressed', adapter.model_id === state.selected);
    put(updates, adapter.step);
    const values = adapter.curves.loss?.values ?? [];
    put(loss, values.length ? number(values.at(-1)) : '–');
    spark(course.firstChild, adapter.curves.loss);
    put(tokens, compact.format(adapter.tokens));
    put(shape, `${adapter.rank} / ${plain.format(adapter.alpha)}`);
    put(place, adapter.in_memory ? `memory, ${bytes(adapter.bytes)}` : 'disk');
    put(last, ago(adapter.last_request, time));
  });
  $('lost').hidden = !lost.length;
  keyed($('lost'), lost, (one) => one.model_id, () => make('li'), (node, one) => put(node, one.reason));
  detail(all.find((adapter) => adapter.model_id === state.selected));
}

function queue({ pending, answered, own }) {
  put($('pending'), pending);
  put($('answered'), compact.format(answered));
  const create = () => make('li', {}, make('span', { class: 'work' }), make('span', { class: 'waited' }));
  keyed($('queue'), own.slice(0, 5).map((one, i) => ({ ...one, i })), (one) => one.i, create, (node, one) => {
    put(node.firstChild, one.held ? `${one.work}: ${one.held}` : one.work);
    put(node.lastChild, duration(one.waited));
  });
}

function sampling({ waiting, running, tokens }) {
  const now = performance.now();
  const before = state.sampled ?? { tokens, now };
  state.sampled = { tokens, now };
  const rate = now > before.now ? (1000 * (tokens - before.tokens)) / (now - before.now) : 0;
  const speed = rate > 0 ? `, ${number(rate)} tokens/s` : '';
  put($('sampling'), `Sampling: ${count(running, 'continuation')} at work, ${count(waiting, 'request')} before them, ` +
    `${compact.format(tokens)} tokens so far${speed}.`);
}

function memory({ peak_rss: ranks, adapters: held, adapters_limit: limit, fits, storage, storage_limit: most }) {
  const of = (value, limit) => (limit ? `${bytes(value)} of ${bytes(limit)}` : bytes(value));
  const largest = Math.max(...ranks, 1);
  const meters = [
    { name: 'Adapters', text: of(held, limit), part: limit ? held / limit : undefined },
    { name: 'Output folder', text: of(storage, most), part: most ? storage / most : undefined },
  ];
  if (ranks.length > MOST_RANKS) {
    meters.push({ name: `Largest of ${ranks.length} ranks, peak`, text: bytes(largest) });
  } else {
    ranks.forEach((value, i) => meters.push({ name: `Rank ${i}, peak`, text: bytes(value), part: value / largest, beside: true }));
  }
  if (fits) meters.push({ name: 'Adapters that fit', text: plain.format(fits) });
  const create = () => make('li', {},
    make('p', { class: 'label' }, make('span'), make('span', { class: 'value' })),
    draw('svg', { 'aria-hidden': true }, draw('rect', { class: 'rail', width: '100%', height: 5, rx: 2.5 }),
      draw('rect', { class: 'level', height: 5, rx: 2.5 })));
  keyed($('memory'), meters, (meter) => meter.name, create, (node, { name, text, part, beside }) => {
    put(node.querySelector('.label').firstChild, name);
    put(node.querySelector('.value'), text);
    node.lastChild.toggleAttribute('hidden', part === undefined);
    const bar = node.querySelector('.level');
    bar.setAttribute('width', `${(100 * Math.min(1, part ?? 0)).toFixed(1)}%`);
    bar.classList.toggle('beside', Boolean(beside));
    bar.classList.toggle('high', !beside && part > 0.9);
  });
}

function sessions({ sessions: all, time }) {
  put($('sessions-caption'), all.length ? `${count(all.length, 'session')}, newest first.` : 'No client has opened a session.');
  const create = () => make('tr', {}, make('th', { scope: 'row', class: 'code' }), make('td'),
    make('td', { class: 'number wide' }), make('td'), make('td', { class: 'wide' }));
  keyed($('session-rows'), all, (one) => one.session_id, create, (row, one) => {
    const quiet = time - one.seen > 60 ? 'silent' : 'live';
    const texts = [one.display_name ? `${one.display_name} (${one.session_id})` : one.session_id,
      one.is_ended ? 'ended' : quiet, one.adapters, ago(one.seen, time), ago(one.opened, time)];
    texts.forEach((text, i) => put(row.children[i], text));
  });
}

const dates = new Intl.DateTimeFormat(undefined, { dateStyle: 'medium', timeStyle: 'short' });
const saved = (time) => dates.format(new Date(time));
const KINDS = { training: 'with training state', sampler: 'for samplers', external: 'for download', full: 'whole model' };

async function checkpoints() {
  const { checkpoints: all, cursor } = await call(`api/v1/checkpoints?limit=${CHECKPOINTS}`);
  const total = cursor?.total_count ?? all.length;
  const before = state.checkpoints;
  if (before !== undefined && total > before) announce(`${count(total - before, 'new checkpoint')}`);
  state.checkpoints = total;
  const more = total > all.length ? `; the last ${all.length} are shown` : '';
  put($('checkpoints-caption'), total ? `${count(total, 'checkpoint')}, newest first${more}.` : 'Nothing is saved yet.');
  const create = (one) => {
    const [run, kind, name] = one.tinker_path.replace(/^[a-z]+:\/\//, '').split('/');
    const button = make('button', { type: 'button', 'aria-expanded': false, 'aria-label': `Files of ${name} of ${run}` }, 'Files');
    const list = make('ul', { class: 'files', hidden: '' });
    button.addEventListener('click', () => files(button, list, `api/v1/training_runs/${encodeURIComponent(run)}/checkpoints/${kind}/${encodeURIComponent(name)}`));
    return make('tr', {}, make('th', { scope: 'row', class: 'code' }, name), make('td', { class: 'code' }, run),
      make('td', { class: 'wide' }, KINDS[one.checkpoint_type] ?? one.checkpoint_type),
      make('td', { class: 'number' }, bytes(one.size_bytes)),
      make('td', { class: 'wide' }, saved(one.time)), make('td', {}, button, list));
  };
  keyed($('checkpoint-rows'), all, (one) => `${one.tinker_path} ${one.time}`, create, () => {});
}

// Opens or closes the list of a checkpoint's files. Their addresses are signed, and hold for an hour.
async function files(button, list, path) {
  const opens = list.hidden;
  button.setAttribute('aria-expanded', opens);
  list.hidden = !opens;
  if (!opens) return;
  try {
    const { urls } = await call(`${path}/external_weights_urls`);
    const link = ([file, url]) => make('li', {},
      make('a', { href: new URL(url).pathname.slice(1), download: file.split('/').at(-1) }, file));
    list.replaceChildren(...Object.entries(urls).map(link));
  } catch (error) {
    list.replaceChildren(make('li', { class: 'error' }, error.message));
  }
}

// --- The course of the page

function show(overview) {
  state.overview = overview;
  const { server } = overview;
  if (server.healthy) health('fine', server.has_keys ? `All ranks run, key of ${server.tenant}` : 'All ranks run');
  else health('bad', 'A rank has failed: restart the server');
  put($('base'), server.base_model);
  put($('version'), `xorl-dist ${server.version}, started ${duration(server.uptime)} ago.`);
  document.title = `${server.base_model.split('/').at(-1)} · xorl-dist`;
  $('key-button').hidden = !server.has_keys;
  $('metrics-link').hidden = server.has_keys;
  throughput(overview.throughput);
  queue(overview.queue);
  sampling(overview.sampling);
  memory(overview.memory);
  adapters(overview);
  sessions(overview);
}

const trial = new Trial(ask, announce);
let timer;

async function poll() {
  clearTimeout(timer);
  const asked = state.selected;
  try {
    show(await call(`api/v1/overview?adapter=${encodeURIComponent(asked ?? '')}`));
    if ($('key-dialog').open) $('key-dialog').close();
    state.failures = 0;
    if (Date.now() - state.lists > POLL_SLOW) {
      state.lists = Date.now();
      await checkpoints();
      trial.show((await call('v1/models')).data, state.overview.server.base_model);
    }
  } catch (error) {
    if (error instanceof Refused) return;
    console.error(error);
    state.failures += 1;
    if (state.failures > 1) health('bad', 'The server does not answer');
  }
  clearTimeout(timer);
  // All curves of an adapter that has just been selected come at once.
  const pause = state.failures > 2 ? POLL_SLOW : POLL;
  if (!document.hidden) timer = setTimeout(poll, state.selected === asked ? pause : 0);
}

function begin() {
  chooseTheme();
  $('adapter-rows').addEventListener('click', (event) => {
    const pick = event.target.closest('.pick');
    if (!pick) return;
    state.selected = pick.textContent;
    announce(`Curves of ${state.selected}`);
    adapters(state.overview);
    poll();
  });
  $('key-button').addEventListener('click', () => $('key-dialog').showModal());
  $('key-form').addEventListener('submit', (event) => {
    event.preventDefault();
    state.key = $('key').value.trim();
    keep('sessionStorage', 'xorl-key', state.key);
    $('key').value = '';
    put($('key-error'), '');
    state.lists = 0;
    poll();
  });
  document.addEventListener('visibilitychange', () => { if (!document.hidden) poll(); });
  addEventListener('resize', () => plots.forEach((plot) => plot.draw()));
  poll();
}

begin();
