// Shows the pair of runs, the image and the order that a reader chooses.
(async () => {
  const {data, byId, all, paintDifference} = page;
  const count = data.images.length;
  const shown = {before: 0, after: 1, image: 0};
  const cells = data.names.map((_, run) => all(`.cell[data-run="${run}"]`));
  const heads = all('.head');
  const pictures = cells.map(row => row.map(cell => cell.querySelector('img')));
  let order = data.images.map((_, image) => image);

  const called = image => `image ${data.images[image]}` + (data.labels.length ? `, ${data.labels[image]}` : '');
  const change = (run, image) => data.changes[shown.before][run][image];
  const written = (run, image) => change(run, image).toFixed(1);

  const scratch = [0, 1].map(() => new OffscreenCanvas(byId('under').width, byId('under').height)
    .getContext('2d', {willReadFrequently: true}));

  function paint(canvas, run, what) {
    canvas.getContext('2d').drawImage(pictures[run][shown.image], 0, 0, canvas.width, canvas.height);
    canvas.setAttribute('aria-label', `${what}: ${data.names[run]}, ${called(shown.image)}`);
  }

  function pixels(context, run) {
    const {width, height} = context.canvas;
    context.drawImage(pictures[run][shown.image], 0, 0, width, height);
    return context.getImageData(0, 0, width, height).data;
  }

  function draw() {
    const {before, after, image} = shown;
    paint(byId('under'), before, 'before');
    paint(byId('over'), after, 'after');
    paintDifference(byId('difference').getContext('2d'), pixels(scratch[1], after), pixels(scratch[0], before));
    byId('change').value = `Image ${data.images[image]}: differs by ${written(after, image)} of 255`;
    byId('difference').setAttribute('aria-label', `${data.names[after]} minus ${data.names[before]}, ${called(image)}: ` +
                                    `differs by ${written(after, image)} of 255`);
    byId('before').value = before;
    byId('after').value = after;
    byId('image').value = image;
    byId('before_number').textContent = byId('base_number').textContent = before + 1;
    byId('after_number').textContent = after + 1;
    cells.forEach((row, run) => row.forEach((cell, place) => {
      cell.setAttribute('aria-pressed', String(place === image && (run === before || run === after)));
    }));
  }

  function label() {
    cells.forEach((row, run) => row.forEach((cell, image) => {
      cell.querySelector('small').textContent = run === shown.before ? '\u2013' : written(run, image);
    }));
  }

  function arrange() {
    const how = byId('order').value, keys = {
      given: image => image, number: image => data.images[image], change: image => -change(shown.after, image)};
    order = data.images.map((_, image) => image).sort((one, other) => keys[how](one) - keys[how](other) || one - other);
    for (const row of [heads, ...cells]) row[0].parentElement.append(...order.map(image => row[image]));
    byId('image').append(...order.map(image => byId('image').querySelector(`[value="${image}"]`)));
  }

  function choose(values) {
    Object.assign(shown, values);
    if ('before' in values || 'after' in values) {
      label();
      if (byId('order').value === 'change') arrange();
    }
    draw();
  }

  function go(place) {
    choose({image: order[Math.max(0, Math.min(count - 1, place))]});
  }

  function divide(percent) {
    const part = Math.max(0, Math.min(100, percent));
    byId('part').value = part;
    byId('over').style.clipPath = `inset(0 0 0 ${part}%)`;
    byId('edge').style.left = `${part}%`;
  }

  function listen() {
    for (const id of ['before', 'after', 'image']) {
      byId(id).addEventListener('change', event => choose({[id]: Number(event.target.value)}));
    }
    byId('order').addEventListener('change', arrange);
    byId('previous').addEventListener('click', () => go(order.indexOf(shown.image) - 1));
    byId('next').addEventListener('click', () => go(order.indexOf(shown.image) + 1));
    byId('part').addEventListener('input', event => divide(Number(event.target.value)));
    cells.forEach((row, run) => row.forEach((cell, image) => cell.addEventListener('click', () => {
      choose(run === shown.before ? {image} : {image, after: run});
    })));
    const move = event => {
      const box = byId('pair').getBoundingClientRect();
      divide(Math.round(100 * (event.clientX - box.left) / box.width));
    };
    byId('pair').addEventListener('pointerdown', event => { byId('pair').setPointerCapture(event.pointerId); move(event); });
    byId('pair').addEventListener('pointermove', event => { if (event.buttons) move(event); });
    addEventListener('keydown', event => {
      if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest('input, select, .scroll:focus')) return;
      const at = order.indexOf(shown.image);
      const places = {ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: count - 1};
      if (!(event.key in places)) return;
      event.preventDefault();
      go(places[event.key]);
    });
  }

  await Promise.all(pictures.flat().map(picture => picture.decode()));
  byId('order').value = 'given';          // where a browser keeps fields of pages from before
  label();
  divide(50);
  draw();
  listen();
  document.documentElement.dataset.ready = 'yes';
})();
