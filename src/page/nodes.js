// Nodes of the page, and words for its numbers.

export function attributes(node, values) {
  for (const [name, value] of Object.entries(values)) node.setAttribute(name, value);
  return node;
}

export function make(tag, values = {}, ...children) {
  const node = attributes(document.createElement(tag), values);
  node.append(...children);
  return node;
}

export function draw(tag, values = {}, ...children) {
  const node = attributes(document.createElementNS('http://www.w3.org/2000/svg', tag), values);
  node.append(...children);
  return node;
}

export function put(node, text) {
  if (node.textContent !== String(text)) node.textContent = text;
}

// Brings the children of `parent` in line with `items`: one child for each key.
export function keyed(parent, items, key, create, update) {
  const wanted = new Map(items.map((item) => [String(key(item)), item]));
  const known = new Map();
  for (const child of [...parent.children]) {
    if (wanted.has(child.dataset.key)) known.set(child.dataset.key, child); else child.remove();
  }
  let place = parent.firstElementChild;
  for (const [name, item] of wanted) {
    let child = known.get(name);
    if (!child) {
      child = create(item);
      child.dataset.key = name;
    }
    update(child, item);
    if (child === place) place = place.nextElementSibling; else parent.insertBefore(child, place);
  }
}

export const plain = new Intl.NumberFormat('en', { maximumSignificantDigits: 4 });
export const compact = new Intl.NumberFormat('en', { notation: 'compact', maximumSignificantDigits: 3 });

export function number(value) {
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2).replace(/\.?0*e/, 'e') : plain.format(value);
}

export function bytes(value) {
  const units = ['B', 'KB', 'MB', 'GB', 'TB'];
  let unit = 0;
  for (; value >= 1024 && unit < 4; unit++) value /= 1024;
  return `${new Intl.NumberFormat('en', { maximumSignificantDigits: 3 }).format(value)} ${units[unit]}`;
}

export function duration(seconds) {
  if (seconds < 60) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} d`;
}

export const ago = (time, now) => (now - time < 2 ? 'now' : `${duration(now - time)} ago`);
export const count = (many, one, more = `${one}s`) => `${many} ${many === 1 ? one : more}`;
