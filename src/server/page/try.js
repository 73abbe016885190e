// The box that tries an adapter beside the base: both are asked at once, and their texts are shown as they come.

import { keyed, make, put } from './nodes.js';

const $ = (id) => document.getElementById(id);

// The data of a response of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error('The answer ended before it was complete.');
    const parts = (rest + value).split('\n\n');
    rest = parts.pop();
    for (const part of parts) {
      // Lines that begin with ':' keep the connection alive.
      if (!part.startsWith('data: ')) continue;
      const data = part.slice('data: '.length);
      if (data === '[DONE]') return;
      yield JSON.parse(data);
    }
  }
}

export class Trial {
  // `ask(path, body, signal)` gives a response that is in order; `announce` tells screen readers.
  constructor(ask, announce) {
    Object.assign(this, { ask, announce, base: null, stopping: null });
    $('try').addEventListener('submit', (event) => {
      event.preventDefault();
      if (this.stopping) this.stopping.abort(); else this.run();
    });
  }

  // Shows the models of `v1/models` that can be tried.
  show(models, base) {
    const names = models.map((model) => model.id);
    this.base = base;
    const adapters = names.filter((name) => name !== base);
    keyed($('try-adapter'), adapters, (name) => name, (name) => make('option', { value: name }, name), () => {});
    $('try').hidden = !adapters.length;
    $('try-absent').hidden = Boolean(adapters.length);
  }

  async run() {
    const adapter = $('try-adapter').value;
    put($('try-base-title'), this.base);
    put($('try-adapter-title'), adapter);
    this.stopping = new AbortController();
    put($('try-button'), 'Stop');
    // Readers of the page hear the texts once, when they are complete.
    $('try-pair').setAttribute('aria-busy', true);
    const ends = await Promise.all([this.write(this.base, $('try-base-text')), this.write(adapter, $('try-adapter-text'))]);
    $('try-pair').removeAttribute('aria-busy');
    put($('try-button'), 'Ask both');
    this.stopping = null;
    this.announce(ends.every(Boolean) ? 'Both texts are complete' : 'Not both texts are complete');
  }

  // Writes the answer of a model into a node. Returns whether it is complete.
  async write(model, node) {
    const [max_tokens, temperature] = ['try-tokens', 'try-temperature'].map((id) => Number($(id).value));
    const prompt = $('try-prompt').value;
    const isChat = $('try-form').value === 'chat';
    const form = isChat ? { messages: [{ role: 'user', content: prompt }] } : { prompt };
    node.classList.remove('failed');
    put(node, '…');
    let text = '';
    try {
      const body = { model, max_tokens, temperature, stream: true, ...form };
      const response = await this.ask(isChat ? 'v1/chat/completions' : 'v1/completions', body, this.stopping.signal);
      for await (const event of events(response)) {
        if (event.error) throw new Error(event.error.message);
        const choice = event.choices[0];
        text += choice?.delta?.content ?? choice?.text ?? '';
        if (text) put(node, text);
      }
      if (!text) put(node, '(nothing)');
      return true;
    } catch (error) {
      const isStopped = error.name === 'AbortError';
      node.classList.toggle('failed', !isStopped);
      put(node, isStopped ? `${text} (stopped)` : error.message);
      return false;
    }
  }
}
