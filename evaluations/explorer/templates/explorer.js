// Draws what stands in #data for the step, the image, the block and the threshold that a reader chooses.
(async () => {
  const {data, byId, all, signed, paintDifference} = page;
  const {width, height, columns, settings, thresholds} = data;
  const count = data.steps.length, most = thresholds.length - 1;
  const setting = letter => settings.find(one => one.letter === letter);
  const shown = {step: 0, image: 0};

  // Pictures: a sheet holds all steps of an image.

  const loaded = [];
  for (const one of settings) {
    for (const picture of Object.values(one.pictures)) {
      picture.images = picture.sheets.map(uri => {
        const image = new Image();
        image.src = uri;
        loaded.push(image.decode());
        return image;
      });
    }
    for (const block of Object.values(one.attention)) {
      block.received = Uint8Array.from(atob(block.data), letter => letter.charCodeAt(0));
    }
  }

  function paintSigned(context) {
    const pixels = context.getImageData(0, 0, width, height);
    for (let i = 0; i < pixels.data.length; i += 4) {
      const level = 3 * pixels.data[i];
      for (let channel = 0; channel < 3; channel++) pixels.data[i + channel] = signed[level + channel];
    }
    context.putImageData(pixels, 0, 0);
  }

  function paintSheet(context, picture, image, w, h) {
    const {step} = shown;
    context.imageSmoothingEnabled = false;
    context.drawImage(picture.images[image], (step % columns) * width, Math.floor(step / columns) * height, width, height,
                      0, 0, w, h);
  }

  const scratch = ['A', 'B'].map(() => new OffscreenCanvas(width, height).getContext('2d', {willReadFrequently: true}));

  function paintOneMinusOther(context, name, image) {
    const [one, other] = settings.map((each, i) => {
      paintSheet(scratch[i], each.pictures[name], image, width, height);
      return scratch[i].getImageData(0, 0, width, height).data;
    });
    paintDifference(context, one, other);
  }

  // Draws a picture into a canvas; returns its title, and a note on it.
  function paint(canvas, letter, name, image) {
    const context = canvas.getContext('2d', {willReadFrequently: true});
    let title, note = '', off = false;
    if (letter === 'A-B') {
      paintOneMinusOther(context, name, image);
      title = settings[0].pictures[name].title;
      note = 'full colour at \u00b11';
    } else {
      const one = setting(letter), picture = one.pictures[name];
      title = picture.title;
      const active = picture.term === null || one.terms[picture.term].active[shown.step];
      if (!active || !picture.known[shown.step]) {
        context.clearRect(0, 0, width, height);
        off = true;
        note = active ? `known at step ${picture.known.lastIndexOf(true, shown.step) + 1}, not here` : 'not guided at this step';
      } else {
        paintSheet(context, picture, image, width, height);
        if (picture.drawn === 'signed') {
          paintSigned(context);
          note = `full colour at \u00b1${picture.scale}`;
        }
      }
    }
    canvas.classList.toggle('off', off);
    const setTitle = settings.length > 1 ? `${letter}: ` : '';
    canvas.setAttribute('aria-label', `${setTitle}${title}, image ${data.images[image]}, ${place()}` +
                                      (note ? `, ${note}` : ''));
    return note;
  }

  const place = () => `step ${shown.step + 1} of ${count}`;
  const written = value => !value ? '0' : Math.abs(value) >= 1e4 || Math.abs(value) < 1e-3
    ? value.toExponential(1).replace('.0e', 'e').replace('e+', 'e') : String(Number(value.toPrecision(3)));

  // Attention

  function drawAttention() {
    if (!byId('block')) return;
    const name = byId('block').value, psi = Number(byId('psi').value), heat = byId('shown').value === 'heat';
    const hundredths = thresholds[psi].toFixed(2);
    byId('psi_value').value = Number(hundredths) === thresholds[psi] ? hundredths : thresholds[psi];
    for (const canvas of all('canvas[data-attention]')) {
      const one = setting(canvas.dataset.attention), block = one.attention[name], context = canvas.getContext('2d', {willReadFrequently: true});
      const [rows, cells] = block.grid, tokens = rows * cells;
      const first = (shown.image * count + shown.step) * tokens;
      const received = block.received.subarray(first, first + tokens);
      paintSheet(context, one.pictures.x0_unguided, shown.image, canvas.width, canvas.height);
      let masked = 0;
      received.forEach((value, token) => {
        const above = value > psi;
        masked += above;
        const opacity = heat ? 0.85 * Math.max(0, thresholds[Math.min(value, most)] / thresholds[most]) : above ? 0.55 : 0;
        if (!opacity) return;
        const x = token % cells, y = Math.floor(token / cells);
        const left = Math.round(x * canvas.width / cells), top = Math.round(y * canvas.height / rows);
        context.fillStyle = `rgba(226, 35, 26, ${opacity})`;
        context.fillRect(left, top, Math.round((x + 1) * canvas.width / cells) - left,
                         Math.round((y + 1) * canvas.height / rows) - top);
      });
      const share = `${masked} of ${tokens} tokens masked (${(100 * masked / tokens).toFixed(1)} %)`;
      document.querySelector(`.share[data-setting="${one.letter}"]`).value = share;
      canvas.setAttribute('aria-label', `${settings.length > 1 ? `${one.letter}: ` : ''}attention of ${name}, image ` +
                                        `${data.images[shown.image]}, ${place()}: ${share}`);
    }
  }

  // Time line and chart

  const DASHES = ['', '6 4', '2 5', '8 3 2 3'];      // of a term and of the sum, of A and of B
  const colour = place => `var(--c${place % 6})`;
  const element = (name, attributes, text) => {
    const one = document.createElementNS('http://www.w3.org/2000/svg', name);
    for (const [key, value] of Object.entries(attributes)) one.setAttribute(key, value);
    if (text !== undefined) one.textContent = text;
    return one;
  };
  const MARGIN = {left: 64, right: 12, top: 12, bottom: 28};
  const wide = box => Math.max(200, box.clientWidth);       // also before the page has any width
  const at = (box, step) => MARGIN.left + (wide(box) - MARGIN.left - MARGIN.right) *
    (count > 1 ? step / (count - 1) : 0.5);

  function frame(box) {
    const w = wide(box), h = box.clientHeight;
    const svg = element('svg', {width: w, height: h, viewBox: `0 0 ${w} ${h}`, 'aria-hidden': 'true'});
    svg.append(element('text', {x: MARGIN.left, y: h - 8}, 'noise'),
               element('text', {x: w - MARGIN.right, y: h - 8, 'text-anchor': 'end'}, 'image'));
    box.replaceChildren(svg);
    return svg;
  }

  function axis(svg, box, values) {
    for (const [value, y] of values) {
      svg.append(element('line', {x1: MARGIN.left, x2: wide(box) - MARGIN.right, y1: y, y2: y,
                                  stroke: 'var(--grid)'}),
                 element('text', {x: MARGIN.left - 6, y: y + 4, 'text-anchor': 'end'}, written(value)));
    }
  }

  function line(svg, box, values, y, stroke, dash) {
    let points = [];
    const end = () => {
      if (points.length === 1) svg.append(element('circle', {cx: points[0][0], cy: points[0][1], r: 4, fill: stroke}));
      else svg.append(element('polyline', {points: points.join(' '), fill: 'none', stroke, 'stroke-width': 2,
                                           'stroke-dasharray': dash}));
      points = [];
    };
    values.forEach((value, step) => {
      if (value === undefined) return;
      if (value !== null) points.push([at(box, step), y(value)]);
      else if (points.length) end();
    });
    if (points.length) end();
  }

  function marker(svg, box) {
    svg.append(element('line', {class: 'marker', y1: MARGIN.top, y2: box.clientHeight - MARGIN.bottom,
                                stroke: 'var(--text)', 'stroke-width': 1.5}));
  }

  function drawTimeline() {
    const box = byId('timeline');
    const bars = settings.flatMap((one, place) => one.terms.map((term, number) => ({term, number, place, one})));
    const svg = frame(box), bottom = box.clientHeight - MARGIN.bottom - 26 * bars.length;
    const logs = data.sigma.map(value => Math.log10(Math.max(value, 1e-6)));
    const low = Math.min(...logs), high = Math.max(...logs, low + 1e-6);
    const y = value => MARGIN.top + 8 + (bottom - MARGIN.top - 16) * (high - value) / (high - low);
    const ticks = [];
    for (let power = Math.ceil(low); power <= high; power++) ticks.push([10 ** power, y(power)]);
    axis(svg, box, ticks);
    line(svg, box, logs, y, 'var(--text)', '');
    svg.append(element('text', {x: MARGIN.left + 6, y: bottom - 8}, 'sigma'));
    const half = count > 1 ? (at(box, 1) - at(box, 0)) / 2 : 20;
    bars.forEach(({term, number, one}, row) => {
      const top = bottom + 4 + 26 * row;
      term.active.forEach((on, step) => {
        if (!on) return;
        const left = Math.max(MARGIN.left, at(box, step) - half);
        const right = Math.min(wide(box) - MARGIN.right, at(box, step) + half);
        svg.append(element('rect', {x: left, y: top + 17, width: right - left + 0.3, height: 5, fill: colour(number)}));
      });
      svg.append(element('text', {x: MARGIN.left, y: top + 13},
                         (settings.length > 1 ? `${one.letter}: ` : '') + term.title));
    });
    marker(svg, box);
  }

  function drawChart() {
    const box = byId('chart');
    if (!box) return;
    const lines = settings.flatMap((one, place) => one.rms.map((rms, number) => (
      {title: (settings.length > 1 ? `${one.letter}: ` : '') + rms.title, values: rms.values[shown.image],
       // Of 0 there is no logarithm; a line goes on over a step of which nothing is known.
       drawn: rms.values[shown.image].map(value => value === null ? undefined : value || null),
       stroke: colour(number), dash: DASHES[2 * rms.sum + place]})));
    const svg = frame(box), bottom = box.clientHeight - MARGIN.bottom;
    const positive = lines.flatMap(one => one.values).filter(value => value > 0).map(Math.log10);
    const low = Math.floor(Math.min(...positive, 0)), high = Math.max(...positive.map(Math.ceil), low + 1);
    const y = value => MARGIN.top + (bottom - MARGIN.top) * (high - Math.log10(value)) / (high - low);
    const stride = Math.ceil((high - low) / 6), ticks = [];
    for (let power = low; power <= high; power += stride) ticks.push([10 ** power, y(10 ** power)]);
    axis(svg, box, ticks);
    lines.forEach(one => line(svg, box, one.drawn, y, one.stroke, one.dash));
    marker(svg, box);
    byId('legend').replaceChildren(...lines.map(one => {
      const item = document.createElement('li'), sample = element('svg', {width: 28, height: 8, 'aria-hidden': 'true'});
      sample.append(element('line', {x1: 0, x2: 28, y1: 4, y2: 4, stroke: one.stroke, 'stroke-width': 3,
                                     'stroke-dasharray': one.dash}));
      const value = document.createElement('output');
      value.className = 'value';
      item.append(sample, `${one.title}: `, value);
      item.values = one.values;
      return item;
    }));
    label();
  }

  function label() {
    for (const svg of all('.plot svg')) {
      const mark = svg.querySelector('.marker'), x = at(svg.parentElement, shown.step);
      mark.setAttribute('x1', x);
      mark.setAttribute('x2', x);
    }
    const sigma = written(data.sigma[shown.step]);
    byId('timeline').setAttribute('aria-label', `Noise level over the steps: sigma ${sigma} at ${place()}`);
    const items = all('#legend li');
    for (const item of items) {
      const value = item.values[shown.step];
      item.querySelector('.value').value = value === null ? 'unknown' : written(value);
    }
    if (items.length) {
      byId('chart').setAttribute('aria-label', 'Root mean square of the changes: ' +
                                 items.map(item => item.textContent).join(', '));
    }
  }

  // All of it

  function drawAll() {
    const [letter, name] = byId('kind').value.split(' ');
    for (const button of all('.all button')) {
      const image = Number(button.dataset.image);
      paint(button.firstElementChild, letter, name, image);
      button.setAttribute('aria-pressed', String(image === shown.image));
    }
  }

  function draw() {
    byId('where').value = `${place()} \u00b7 t = ${data.steps[shown.step]} \u00b7 sigma ${written(data.sigma[shown.step])}`;
    byId('step').setAttribute('aria-valuetext', byId('where').value);
    for (const canvas of all('canvas[data-name]')) {
      const note = paint(canvas, canvas.dataset.setting, canvas.dataset.name, shown.image);
      canvas.parentElement.querySelector('.note').textContent = note;
    }
    for (const text of all('.losses')) {
      text.textContent = setting(text.dataset.setting).losses.map(
        one => `${one.title}: loss ${written(one.values[shown.image][shown.step])}`).join(' \u00b7 ');
    }
    drawAttention();
    drawAll();
    label();
  }

  let waiting = false;
  function soon() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  }

  function go(step) {
    shown.step = Math.max(0, Math.min(count - 1, step));
    byId('step').value = shown.step;
    soon();
  }

  function choose(image) {
    shown.image = image;
    byId('image').value = image;
    drawChart();
    soon();
  }

  let playing = null;
  function play(on) {
    clearInterval(playing);
    playing = on ? setInterval(() => { if (shown.step < count - 1) go(shown.step + 1); else play(false); }, 120) : null;
    byId('play').textContent = on ? 'Pause' : 'Play';
    byId('play').setAttribute('aria-pressed', String(on));
  }

  function listen() {
    byId('step').addEventListener('input', event => go(Number(event.target.value)));
    byId('image').addEventListener('change', event => choose(Number(event.target.value)));
    byId('play').addEventListener('click', () => {
      if (shown.step === count - 1 && !playing) go(0);
      play(!playing);
    });
    byId('kind').addEventListener('change', soon);
    for (const id of ['block', 'psi', 'shown']) byId(id)?.addEventListener('input', soon);
    for (const button of all('.all button')) {
      button.addEventListener('click', () => choose(Number(button.dataset.image)));
    }
    for (const box of all('.plot')) {
      const move = event => {
        const part = (event.clientX - box.getBoundingClientRect().left - MARGIN.left) /
          (wide(box) - MARGIN.left - MARGIN.right);
        go(Math.round(part * (count - 1)));
      };
      box.addEventListener('pointerdown', event => { box.setPointerCapture(event.pointerId); move(event); });
      box.addEventListener('pointermove', event => { if (event.buttons) move(event); });
    }
    addEventListener('keydown', event => {
      if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest('input, select')) return;
      const steps = {ArrowLeft: shown.step - 1, ArrowRight: shown.step + 1, Home: 0, End: count - 1};
      if (!(event.key in steps)) return;
      event.preventDefault();
      go(steps[event.key]);
    });
    let widths = '';
    new ResizeObserver(() => {
      const now = all('.plot').map(box => box.clientWidth).join();
      if (now === widths) return;
      widths = now;
      drawTimeline();
      drawChart();
      label();
    }).observe(document.body);
  }

  await Promise.all(loaded);
  const reader = settings.find(one => one.block in one.attention);
  if (byId('block')) {
    if (reader) byId('block').value = reader.block;
    byId('psi').value = thresholds.indexOf(reader ? reader.psi : 1);
  }
  drawTimeline();
  drawChart();
  draw();
  listen();
  document.documentElement.dataset.ready = 'yes';
})();
