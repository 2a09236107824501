"""What tests of pages ask a browser for."""

import numpy as np

SIZES = {"phone": (390, 844, True), "desk": (1280, 900, False)}

# Every visible text with its size in CSS pixels, its colour and that of the paper behind it.
TEXTS = """
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
const colour = text => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
while (walker.nextNode()) {
  const node = walker.currentNode, element = node.parentElement;
  if (!node.data.trim() || element.closest('caption') || !element.checkVisibility()) continue;
  const style = getComputedStyle(element), svg = element.ownerSVGElement, range = document.createRange();
  range.selectNodeContents(node);
  const rect = range.getBoundingClientRect();
  let paper = [255, 255, 255];
  for (let other = element; other; other = other.parentElement) {
    const behind = colour(getComputedStyle(other).backgroundColor);
    if (behind.length == 3 || behind[3] == 1) { paper = behind; break; }
  }
  const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
  found.push({text: node.data.trim(), width: rect.width, height: rect.height, size: parseFloat(style.fontSize) * scale,
              ink: colour(svg ? style.fill : style.color), paper: paper});
}
return found;
"""


def contrast(ink, paper):
    """As WCAG 2.1 defines it, of two sRGB colours."""
    def luminance(colour):
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055)**2.4
                  for value in (channel / 255 for channel in colour[:3])]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(ink), luminance(paper)))
    return (light + 0.05) / (dark + 0.05)


def opened(chromium, page, size, scheme="light", ready=True):
    """Shows the page of a path or address, and waits until its script says that it is ready, if it says so."""
    width, height, mobile = SIZES[size]
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                             {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile})
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia",
                             {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    chromium.get(page if isinstance(page, str) else page.as_uri())
    if ready:
        chromium.execute_async_script("""
        const done = arguments[0], look = () => document.documentElement.dataset.ready ? done() : setTimeout(look, 10);
        look();""")
    return chromium


def moved(chromium, **values):
    """Moves fields of the page by their ids, and waits until it is drawn."""
    chromium.execute_async_script("""
        const [values, done] = arguments;
        for (const [id, value] of Object.entries(values)) {
          const field = document.getElementById(id);
          field.value = value;
          for (const kind of ['input', 'change']) field.dispatchEvent(new Event(kind, {bubbles: true}));
        }
        requestAnimationFrame(() => requestAnimationFrame(done));""", values)


def pixels(chromium, selector, width, height):
    """What a canvas shows, (height, width, 4)."""
    flat = chromium.execute_script("""
        const canvas = document.querySelector(arguments[0]);
        return [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data];""", selector)
    return np.array(flat).reshape(height, width, 4)


def assert_readable(chromium, size, scheme, title):
    """Nothing is wider than the screen, texts are large and clear enough, and nothing was loaded or logged."""
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= SIZES[size][0]
    texts = chromium.execute_script(TEXTS)
    assert len(texts) > 20
    for text in texts:
        assert text["size"] >= 11.99, text
        assert contrast(text["ink"], text["paper"]) >= 4.5, text
    assert {text["paper"][0] > 128 for text in texts if text["text"] == title} == {scheme == "light"}
    loaded = chromium.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    assert chromium.get_log("browser") == []
