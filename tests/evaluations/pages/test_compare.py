"""The page of a comparison: what it holds, and what a reader sees of two runs, an image and an order."""

import re

import numpy as np
import pytest
from browser import assert_readable, moved, opened, pixels
from commands import call
from finished import write_run

from evaluations.pages.compare import comparison_page, write_comparison
from guided_diffusion.errors import UserError
from guided_diffusion.runs.comparison import Comparison

COMMAND = "python scripts/compare.py 'a & b' --out </script>"
NAMES = ("plain: no guidance", "sag: SAG <s> = 0.5",
         f"cg{8 * '_without_a_space'}: CG & scale 2, a title that is longer than a phone is wide")


@pytest.fixture(scope="module")
def comparison():
    """Three runs of four images: the images of run r differ from those of the first by r (i + 1), upwards."""
    images = np.random.default_rng(0).integers(0, 200, (1, 4, 16, 16, 3), dtype=np.uint8)
    more = np.outer(np.arange(3), np.arange(1, 5)).astype(np.uint8)[:, :, None, None, None]
    labels = ("class 1", "a <class>", "class 1", "class 2")
    return Comparison(NAMES, (3, 5, 8, 9), labels, images + more, ("said & done",))


def test_the_page_escapes_and_loads_nothing(comparison):
    text = comparison_page(comparison, COMMAND)
    assert text.count("<script") == text.count("</script>") == 2
    assert "SAG &lt;s&gt; = 0.5" in text and "a &lt;class&gt;" in text and "said &amp; done" in text
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    assert not re.findall(r"https?://", text) and text.count("data:image/png") == 12


def test_a_page_that_is_too_large_loses_detail_or_is_refused(comparison, tmp_path):
    full = write_comparison(tmp_path / "x.html", comparison, COMMAND)
    smaller = write_comparison(tmp_path / "x.html", comparison, COMMAND, limit=full - 1)
    assert smaller < full and "with loss (WebP" in (tmp_path / "x.html").read_text()
    with pytest.raises(UserError, match="--num_images: the page would take"):
        write_comparison(tmp_path / "none.html", comparison, COMMAND, limit=1000)


def seen(chromium):
    return chromium.execute_script("""
        const box = one => [one.getBoundingClientRect().left, one.getBoundingClientRect().top + scrollY,
                            one.getBoundingClientRect().width, one.getBoundingClientRect().height];
        const all = selector => [...document.querySelectorAll(selector)];
        return {change: change.value, clip: over.style.clipPath, order: all('.head span').map(one => one.innerText),
                changes: all('.cell small').slice(4).map(one => one.innerText),
                pressed: all('.cell[aria-pressed=true]').map(one => [one.dataset.run, one.dataset.image]),
                alts: [...all('canvas').map(one => one.ariaLabel), ...all('img').map(one => one.alt)],
                places: all('section, h2, canvas, figure, .strip, select, .controls button').map(box)};""")


@pytest.mark.parametrize("size, scheme", [("desk", "light"), ("phone", "dark"), ("phone", "light")])
def test_what_a_reader_sees(chromium, comparison, tmp_path, size, scheme):
    write_comparison(tmp_path / "x.html", comparison, COMMAND)
    opened(chromium, tmp_path / "x.html", size, scheme)
    before = seen(chromium)
    assert before["change"] == "Image 3: differs by 1.0 of 255" and before["order"] == ["3", "5", "8", "9"]
    assert before["pressed"] == [["0", "0"], ["1", "0"]]
    moved(chromium, part=25, after=2, image=1)
    after = seen(chromium)
    assert after["change"] == "Image 5: differs by 4.0 of 255" and after["clip"].endswith("25%)")
    assert before["places"] == after["places"] and all(after["alts"])             # nothing moves
    assert f"after: {NAMES[2]}, image 5, a <class>" in after["alts"]
    assert np.array_equal(pixels(chromium, "#over", 16, 16)[..., :3], comparison.images[2, 1])
    assert np.array_equal(pixels(chromium, "#under", 16, 16)[..., :3], comparison.images[0, 1])
    red, _, blue = np.moveaxis(pixels(chromium, "#difference", 16, 16)[..., :3], -1, 0)
    assert (red > blue).all()
    moved(chromium, before=1, order="change")
    now = seen(chromium)
    assert now["order"] == ["9", "8", "5", "3"] and now["changes"][:4] == ["4.0", "3.0", "2.0", "1.0"]
    assert not chromium.execute_script(
        "return [...document.querySelectorAll('.label')].filter(one => one.scrollWidth > one.clientWidth).length")
    assert now["changes"][4:8] == ["\N{EN DASH}"] * 4
    assert_readable(chromium, size, scheme, "3 runs, 4 images of each")


def test_keys_buttons_and_the_edge(chromium, comparison, tmp_path):
    from selenium.webdriver.common.keys import Keys

    write_comparison(tmp_path / "x.html", comparison, COMMAND)
    opened(chromium, tmp_path / "x.html", "desk")
    body = chromium.find_element("tag name", "body")
    left, right = Keys.ARROW_LEFT, Keys.ARROW_RIGHT
    for key, image in ((right, 5), (Keys.END, 9), (right, 9), (left, 8), (Keys.HOME, 3)):
        body.send_keys(key)
        assert seen(chromium)["change"].startswith(f"Image {image}:"), key
    chromium.execute_script("""
        document.querySelector('.cell[data-run="2"][data-image="3"]').click();
        const box = pair.getBoundingClientRect();
        pair.setPointerCapture = () => {};
        const place = {clientX: box.left + 0.75 * box.width, clientY: box.top};
        pair.dispatchEvent(new PointerEvent('pointerdown', place));""")
    now = seen(chromium)
    assert now["pressed"] == [["0", "3"], ["2", "3"]] and now["clip"].endswith("75%)")
    assert chromium.execute_script("return [command.textContent, part.value]") == [COMMAND, "75"]


def test_the_command(tmp_path, capsys):
    runs = [write_run(tmp_path / name, np.full((2, 8, 8, 3), 90, np.uint8)) for name in ("a", "b")]
    assert call("compare", *runs, "--out", tmp_path / "x.png", "--page", tmp_path / "y.html") == 0
    picture, page = capsys.readouterr().out.splitlines()
    assert picture == f"comparison: {tmp_path / 'x.png'}" and page.startswith(f"page: {tmp_path / 'y.html'} (")
    assert (tmp_path / "x.png").exists() and "scripts/compare.py" in (tmp_path / "y.html").read_text()
    assert call("compare", *runs, "--out", tmp_path / "only.html") == 0
    assert not (tmp_path / "only.png").exists() and capsys.readouterr().out.startswith("page: ")
    assert call("compare", runs[0], "--out", tmp_path / "one.html") == 2
    assert "one.html: a page compares at least two runs" in capsys.readouterr().err
    assert call("compare", *runs, "--out", tmp_path / "x.png", "--page", tmp_path / "x.png") == 2
    assert "x.png: must end in .html, .htm" in capsys.readouterr().err
    assert call("compare", *runs, "--out", tmp_path / "x.jpg") == 2
    assert "x.jpg: must end in .png, .html, .htm" in capsys.readouterr().err
