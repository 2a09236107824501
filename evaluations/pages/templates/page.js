'use strict';
// What the scripts of pages share: what stands in #data, elements, colours of signed values, and the copy button.
const page = (() => {
  const byId = id => document.getElementById(id);
  const all = selector => [...document.querySelectorAll(selector)];

  // Colours of levels 1 to 255, from blue by white (128) to red.
  const signed = new Uint8ClampedArray(256 * 3);
  for (let level = 0; level < 256; level++) {
    const part = Math.min(1, Math.abs(level - 128) / 127), end = level < 128 ? [20, 80, 170] : [178, 24, 43];
    end.forEach((value, channel) => { signed[3 * level + channel] = 255 + (value - 255) * part; });
  }

  // Paints one RGBA picture minus another of the same size, the mean over the channels, full colour at plus and minus 1.
  function paintDifference(context, one, other) {
    const pixels = context.createImageData(context.canvas.width, context.canvas.height);
    for (let i = 0; i < one.length; i += 4) {
      const mean = (one[i] + one[i + 1] + one[i + 2] - other[i] - other[i + 1] - other[i + 2]) / 3 / 127.5;
      const level = Math.round(128 + 127 * Math.sign(mean) * Math.sqrt(Math.min(1, Math.abs(mean))));
      for (let channel = 0; channel < 3; channel++) pixels.data[i + channel] = signed[3 * level + channel];
      pixels.data[i + 3] = 255;
    }
    context.putImageData(pixels, 0, 0);
  }

  async function copy() {
    let done = true;
    try {
      await navigator.clipboard.writeText(byId('command').textContent);
    } catch {
      getSelection().selectAllChildren(byId('command'));
      done = document.execCommand('copy');
    }
    byId('copy').textContent = done ? 'Copied' : 'Select it';
    setTimeout(() => { byId('copy').textContent = 'Copy'; }, 2000);
  }
  byId('copy')?.addEventListener('click', copy);

  return {data: JSON.parse(byId('data').textContent), byId, all, signed, paintDifference};
})();
