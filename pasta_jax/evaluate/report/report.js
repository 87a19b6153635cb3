const packed = name => document.getElementById(name).textContent.trim();
async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'))).text();
}
(async () => {
  const data = JSON.parse(await inflate(packed('answers')));
  const drawn = JSON.parse(await inflate(packed('timelines')));
  const $ = id => document.getElementById(id);
  let current = null, shows = 0;
  const system = () => $('system').value;
  const add = (parent, tag, cls, text) => {
    const e = document.createElement(tag); e.className = cls; if (text !== undefined) e.textContent = text;
    parent.append(e); return e;
  };
  async function show(i) {
    current = i;
    const turn = ++shows;
    const p = data.prompts[i], out = $('answer');
    const line = (drawn[system()] || {})[p.id], picture = line ? await inflate(line) : '';
    if (turn !== shows) return;  // another one was chosen meanwhile
    out.replaceChildren();
    add(out, 'div', 'prompt', p.prompt);
    add(out, 'div', 'muted', [p.id, p.category].filter(Boolean).join(' · '));
    const frame = add(out, 'div', ''); frame.id = 'timeline';
    frame.innerHTML = picture;
    const pair = add(out, 'div', 'pair');
    for (const name of [system(), ...data.systems.filter(n => n !== system())]) {
      const a = data.answers[name][p.id];
      if (!a) continue;
      const box = add(pair, 'div', '');
      add(box, 'h3', '', name);
      add(box, 'div', 'muted', a.facts);
      add(box, 'div', 'text', a.text);
    }
    for (const b of $('list').querySelectorAll('button')) b.setAttribute('aria-current', b.dataset.i == i);
  }
  function list() {
    const wanted = $('search').value.toLowerCase();
    const rows = data.prompts.map((p, i) => [p, i, data.answers[system()][p.id]])
      .filter(([p, , a]) => a && (p.prompt + ' ' + p.id + ' ' + p.category).toLowerCase().includes(wanted));
    if ($('order').value !== 'file') rows.sort((x, y) => ($('order').value === 'fast' ? -1 : 1) * (x[2].speed - y[2].speed));
    $('list').replaceChildren();
    for (const [p, i, a] of rows) {
      const b = add(add($('list'), 'li', ''), 'button', '');
      b.dataset.i = i; add(b, 'span', 'speed', a.speed.toFixed(2) + '×'); add(b, 'span', 'what', p.prompt);
      b.onclick = () => show(i);
    }
    if (rows.length) show(rows.some(r => r[1] === current) ? current : rows[0][1]);
  }
  for (const id of ['system', 'order']) $(id).onchange = list;
  $('search').oninput = list;
  list();
})();
