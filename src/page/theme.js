// The choice of colours, and storage in which a page keeps it.

// Storage that a browser may refuse: what is kept there is then forgotten with the page.
export function recalled(storage, name) {
  try { return window[storage].getItem(name); } catch { return null; }
}

export function keep(storage, name, value) {
  try { window[storage].setItem(name, value); } catch { /* See above. */ }
}

function theme(name) {
  if (name === 'auto') delete document.documentElement.dataset.theme; else document.documentElement.dataset.theme = name;
  keep('localStorage', 'xorl-theme', name);
}

// Makes the inputs named `theme` choose the colours: auto, light or dark.
export function chooseTheme() {
  const chosen = document.querySelector(`input[name="theme"][value="${recalled('localStorage', 'xorl-theme') ?? 'auto'}"]`);
  if (chosen) {
    chosen.checked = true;
    theme(chosen.value);
  }
  for (const input of document.querySelectorAll('input[name="theme"]')) {
    input.addEventListener('change', () => theme(input.value));
  }
}
