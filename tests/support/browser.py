"""What tests of pages ask a browser for."""

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
