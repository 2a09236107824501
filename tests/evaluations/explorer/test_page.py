"""The explorer's page: what it holds, and what a reader sees after moving the slider and the threshold."""

import base64
import dataclasses
import http.server
import json
import re
import threading
import time

import numpy as np
import pytest
from browser import SIZES, assert_readable, moved, opened, pixels

from evaluations.explorer.page import STATE, page, picture_kinds, sheet_columns, write_page
from evaluations.explorer.recording import Recording, Term
from guided_diffusion.errors import UserError

COMMAND = "python scripts/explore.py --against '<b>&\"' --out explore"
TITLE = "a </script><script>alert(1)</script> & model"


def recorded(images=3, steps=5, seed=0, guided=True, channels=3, size=16):
    """A recording of random numbers; the first of two contrasts does not guide at the first step."""
    rng = np.random.default_rng(seed)
    shape = (images, steps, channels, size, size)
    arrays = {"x_t": rng.normal(size=shape), "x0_unguided": rng.uniform(-1, 1, shape), "x0": rng.uniform(-1, 1, shape),
              "sample": rng.uniform(-1, 1, (images, channels, size, size)),
              "attention_middle": rng.gamma(4, 0.25, (images, steps, 4, 4)),
              "attention_output.1": rng.gamma(4, 0.25, (images, steps, 8, 8))}
    terms = ()
    active = tuple(step > 0 or steps == 1 for step in range(steps))
    if guided:
        terms = (Term("SAG <s> = 0.5", "contrast", 0.5, active), Term("PAG s = 1", "contrast", 1.0, (True,) * steps))
        changes = rng.normal(size=shape) * 0.1, rng.normal(size=shape) * 0.01
        changes[0][:, [not on for on in active]] = 0
        for name, value in (("term0", changes[0]), ("term1", changes[1]), ("eps", changes[0] + changes[1])):
            arrays[f"{name}_change"] = value
            arrays[f"{name}_change_rms" if name == "eps" else f"{name}_rms"] = np.sqrt((value**2).mean(axis=(2, 3, 4)))
        arrays["term0_degraded"] = rng.normal(size=shape)
        arrays["term0_mask"] = (rng.uniform(size=(images, steps, 1, size, size)) > 0.6).astype(float)
    arrays = {name: value.astype(np.float32 if "attention" in name or "rms" in name else np.float16)
              for name, value in arrays.items()}
    title = "SAG <s> = 0.5 + PAG s = 1" if guided else "no guidance"
    return Recording(title, tuple(range(10, 10 + images)), (1,) * images,
                     tuple(reversed(range(steps))), tuple(np.geomspace(100, 0.01, steps).tolist()), terms,
                     {"middle": (4, 4), "output.1": (8, 8)}, "output.1" if guided else "", 1.25 if guided else 1.0,
                     arrays, ("cat <b>",) * images)


def data_of(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


# What the page holds


def test_the_page_escapes_and_loads_nothing():
    text = page([recorded(), recorded(seed=1, guided=False)], TITLE, COMMAND)
    assert text.count("<script") == text.count("</script>") == 2 and "alert(1)</script>" not in text
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in text and "SAG &lt;s&gt; = 0.5" in text
    assert '<option value="0">10, cat &lt;b&gt;</option>' in text
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
    addresses = set(re.findall(r"https?://[^\s'\"]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}          # a name, which nothing loads
    assert page([recorded(), recorded(seed=1, guided=False)], TITLE, COMMAND) == text


def test_the_sum_is_shown_beside_several_changes_alone():
    both, alone = recorded(), recorded()
    assert "eps_change" in [kind.name for kind in picture_kinds(both)]
    alone = dataclasses.replace(alone, terms=alone.terms[:1], arrays={
        name: value for name, value in alone.arrays.items() if not name.startswith("term1")})
    assert "eps_change" not in [kind.name for kind in picture_kinds(alone)]
    assert "eps_change" not in [kind.name for kind in picture_kinds(recorded(guided=False))]


def test_every_kind_of_term_has_a_map_of_its_change():
    both = recorded()
    terms = (both.terms[0], Term("CG scale 1", "gradient", 1.0, both.terms[1].active),
             Term("DCG 40", "loss", 40.0, both.terms[1].active))
    arrays = {**both.arrays, "term2_state_change": both.arrays["term1_change"], "term2_rms": both.arrays["term1_rms"]}
    found = data_of(page([dataclasses.replace(both, terms=terms, arrays=arrays)], TITLE, COMMAND))["settings"][0]
    assert [one["title"] for one in found["pictures"].values() if one["drawn"] == "signed"] == [
        "SAG <s> = 0.5: change of eps", "CG scale 1: change of eps", f"DCG 40: change of {STATE}"]
    assert [line["title"] for line in found["rms"]] == ["SAG <s> = 0.5", "CG scale 1", f"DCG 40, {STATE}"]


@pytest.mark.parametrize("steps, columns", [(1, 1), (2, 2), (4, 2), (5, 3), (50, 8), (250, 16)])
def test_sheets_are_nearly_square(steps, columns):
    assert sheet_columns(steps) == columns


def test_a_page_that_is_too_large_loses_detail_and_says_so_or_is_refused(tmp_path, caplog):
    caplog.set_level("INFO")
    path, one = tmp_path / "explore.html", recorded(images=2, steps=9, size=32)
    full = write_page(path, [one], "model", COMMAND)
    assert "without loss" in path.read_text() and path.stat().st_size == full and not caplog.messages
    smaller = write_page(path, [one], "model", COMMAND, limit=int(0.8 * full))
    assert smaller <= 0.8 * full and "with loss (WebP, quality" in path.read_text()
    assert "with loss" in caplog.messages[0]
    with pytest.raises(UserError, match="--images: the page would take"):
        write_page(tmp_path / "none.html", [one], "model", COMMAND, limit=1000)
    assert not (tmp_path / "none.html").exists()


@pytest.mark.parametrize("psi", [1.25, 1.0, 1.255, 3.0, -0.5, 2.504, 60.0, 1e5])
def test_the_threshold_of_the_method_can_be_chosen_exactly(psi):
    """Each level says on which side of every threshold that is offered a token is, also at the threshold itself."""
    one = recorded()
    one.arrays["attention_middle"][0, 0, 0, :2] = psi, np.nextafter(np.float32(psi), np.float32(np.inf))
    found = data_of(page([dataclasses.replace(one, psi=psi), recorded(guided=False)], TITLE, COMMAND))
    offered = found["thresholds"]
    assert {psi, 1.0} <= set(offered) and offered == sorted(offered) and 100 < len(offered) <= 255
    assert offered[-1] >= max(2.5, psi)
    received = one.arrays["attention_middle"].astype(np.float64).ravel()
    levels = np.frombuffer(base64.b64decode(found["settings"][0]["attention"]["middle"]["data"]), np.uint8)
    for place, threshold in enumerate(offered):
        assert np.array_equal(levels > place, received > threshold)


# What a reader sees


def seen(chromium):
    return chromium.execute_script("""
        const box = one => one.getBoundingClientRect();
        const place = one => [box(one).left, box(one).top + scrollY, box(one).width, box(one).height];
        return {where: document.getElementById('where').innerText,
                shares: [...document.querySelectorAll('.share')].map(one => one.value),
                legend: [...document.querySelectorAll('.legend li')].map(one => one.innerText),
                notes: [...document.querySelectorAll('.note')].map(one => one.innerText),
                places: [...document.querySelectorAll('section, h2, h3, canvas, figure, button, select')].map(place),
                alts: [...document.querySelectorAll('canvas')].map(one => one.ariaLabel),
                pressed: [...document.querySelectorAll('.all button')].map(one => one.ariaPressed)};""")


def shifted(chromium):
    """By how much what was seen has moved since the page was asked for."""
    return chromium.execute_async_script("""
        const done = arguments[0], heard = list => done(list.getEntries().reduce((sum, one) => sum + one.value, 0));
        new PerformanceObserver(heard).observe({type: 'layout-shift', buffered: true});
        setTimeout(() => done(0), 30);""")


def levels(image):
    return np.round((np.moveaxis(image.astype(np.float32), 0, -1).clip(-1, 1) + 1) * 127.5)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two recordings, and the page of both."""
    path = tmp_path_factory.mktemp("explorer") / "explore.html"
    both = [recorded(), recorded(seed=1, guided=False)]
    write_page(path, both, TITLE, COMMAND)
    return both, path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", list(SIZES))
def test_what_a_reader_sees(chromium, compared, size, scheme):
    (first, second), path = compared
    opened(chromium, path, size, scheme)
    assert shifted(chromium) == 0                               # while the page is filled
    before = seen(chromium)
    assert chromium.title == TITLE and before["where"].startswith("step 1 of 5 · t = 4 · sigma 100")
    assert "not guided at this step" in before["notes"]
    moved(chromium, step=3, image=1, psi=90)
    after = seen(chromium)
    assert after["where"] == "step 4 of 5 · t = 1 · sigma 0.1"
    for one, share in zip((first, second), after["shares"], strict=True):
        masked = int((one.arrays["attention_output.1"][1, 3].astype(np.float64) > 0.9).sum())
        assert share == f"{masked} of 64 tokens masked ({100 * masked / 64:.1f} %)"
    rms = first.arrays["term0_rms"][1, 3]
    shown = float(after["legend"][0].rpartition(" ")[2])
    assert after["legend"][0].startswith("A: SAG <s> = 0.5") and abs(shown - rms) <= 5e-3 * rms
    assert "not guided at this step" not in after["notes"] and after["pressed"] == ["false", "true", "false"]
    assert before["places"] == after["places"]                  # nothing moves, nor where more is said
    chromium.execute_script("document.getElementById('where').value = 'step 250 of 250 · t = 249 · sigma 0.00123'")
    assert seen(chromium)["places"] == after["places"]
    assert all(after["alts"]) and "A: x_t, image 11, step 4 of 5" in after["alts"]
    assert_readable(chromium, size, scheme, TITLE)


@pytest.mark.parametrize("size", list(SIZES))
def test_nothing_moves_while_a_page_arrives_in_pieces(chromium, compared, size):
    """A slow disk or processor shows the beginning of a page before its end is read."""
    _, path = compared
    pieces = re.split(r"(?<=</button>\n)|(?<=Block</label>\n)", path.read_text())

    class InPieces(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            for piece in pieces:
                self.wfile.write(piece.encode())
                time.sleep(0.3)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), InPieces) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            opened(chromium, f"http://127.0.0.1:{server.server_port}/", size)
        finally:
            server.shutdown()
    assert len(pieces) > 2 and shifted(chromium) == 0
    assert chromium.execute_script("return document.getElementById('play').checkVisibility({visibilityProperty: true})")


def test_steps_at_which_losses_were_not_told_apart(chromium, tmp_path):
    one = recorded(images=1)
    arrays = {**one.arrays, "state_change": one.arrays["eps_change"], "state_change_rms": one.arrays["eps_change_rms"]}
    for number in (0, 1):
        change, rms = arrays.pop(f"term{number}_change"), arrays[f"term{number}_rms"].copy()
        change[:, 3], rms[:, 3] = np.nan, np.nan
        arrays |= {f"term{number}_state_change": change, f"term{number}_rms": rms}
    terms = tuple(dataclasses.replace(term, kind="loss") for term in one.terms)
    path = tmp_path / "explore.html"
    write_page(path, [dataclasses.replace(one, terms=terms, arrays=arrays)], TITLE, COMMAND)
    opened(chromium, path, "phone")
    moved(chromium, step=3)
    now = seen(chromium)
    assert now["notes"].count("known at step 3, not here") == 2
    assert [line.rpartition(" ")[2] == "unknown" for line in now["legend"]] == [True, True, False]


def test_pictures_are_those_of_the_recording(chromium, compared):
    (first, second), path = compared
    opened(chromium, path, "desk")
    moved(chromium, step=2, image=2)
    image = pixels(chromium, "canvas[data-setting=A][data-name=x0]", 16, 16)
    assert np.array_equal(image[..., :3], levels(first.arrays["x0"][2, 2])) and (image[..., 3] == 255).all()
    change = first.arrays["term0_change"][2, 2].astype(np.float32).mean(axis=0)
    red, _, blue = np.moveaxis(pixels(chromium, "canvas[data-name=term0_change]", 16, 16)[..., :3], -1, 0)
    clear = np.abs(change) > 0.01
    assert ((red > blue) == (change > 0))[clear].all()
    difference = first.arrays["x0"][2, 2].astype(np.float32).mean(axis=0) - second.arrays["x0"][2, 2].astype(
        np.float32).mean(axis=0)
    red, _, blue = np.moveaxis(pixels(chromium, "canvas[data-setting='A-B'][data-name=x0]", 16, 16)[..., :3], -1, 0)
    clear = np.abs(difference) > 0.05
    assert ((red > blue) == (difference > 0))[clear].all()
    mask = pixels(chromium, "canvas[data-name=term0_mask]", 16, 16)[..., 0]
    assert np.array_equal(mask == 255, first.arrays["term0_mask"][2, 2, 0] == 1)
    moved(chromium, kind="B x0")
    shown = pixels(chromium, ".all button:first-child canvas", 16, 16)
    assert np.array_equal(shown[..., :3], levels(second.arrays["x0"][0, 2]))


def test_masked_tokens_are_marked_and_follow_block_and_threshold(chromium, compared):
    (first, _), path = compared
    opened(chromium, path, "desk")
    assert chromium.execute_script("return [block.value, psi.value]") == ["output.1", "125"]
    moved(chromium, block="middle", psi=250)
    plain = pixels(chromium, "canvas[data-attention=A]", 256, 256)
    moved(chromium, psi=100)
    marked = pixels(chromium, "canvas[data-attention=A]", 256, 256)
    changed = (plain != marked).any(axis=-1).reshape(4, 64, 4, 64).any(axis=(1, 3))
    received = first.arrays["attention_middle"][0, 0]
    assert np.array_equal(changed, (received > 1) & (received <= 2.5))


@pytest.mark.parametrize("psi, shown", [(1.255, "1.255"), (3.0, "3.00"), (-0.5, "-0.50")])
def test_the_page_opens_at_the_threshold_of_the_method(chromium, tmp_path, psi, shown):
    one = dataclasses.replace(recorded(images=1), psi=psi)
    one.arrays["attention_output.1"][0, 0, 0, :4] = 1.254, 1.256, 2.9, 3.1
    path = tmp_path / "explore.html"
    write_page(path, [one], TITLE, COMMAND)
    opened(chromium, path, "desk")
    masked = int((one.arrays["attention_output.1"][0, 0] > psi).sum())
    assert chromium.execute_script("return psi_value.value") == shown
    assert seen(chromium)["shares"] == [f"{masked} of 64 tokens masked ({100 * masked / 64:.1f} %)"]


def test_keys_and_buttons(chromium, compared):
    from selenium.webdriver.common.keys import Keys

    _, path = compared
    opened(chromium, path, "phone")
    body = chromium.find_element("tag name", "body")
    left, right = Keys.ARROW_LEFT, Keys.ARROW_RIGHT
    for key, step in ((right, 1), (Keys.END, 4), (right, 4), (left, 3), (Keys.HOME, 0)):
        body.send_keys(key)
        moved(chromium)
        assert seen(chromium)["where"].startswith(f"step {step + 1} of 5"), key
    chromium.find_element("id", "step").send_keys(Keys.ARROW_RIGHT)         # the slider itself
    moved(chromium)
    assert seen(chromium)["where"].startswith("step 2 of 5")
    chromium.execute_script("document.querySelectorAll('.all button')[2].click()")
    moved(chromium)
    assert chromium.execute_script("return image.value") == "2"
    chromium.execute_script("""const box = document.getElementById('timeline'), r = box.getBoundingClientRect();
        box.setPointerCapture = () => {};
        box.dispatchEvent(new PointerEvent('pointerdown', {clientX: r.right - 14, clientY: r.top + 20}));""")
    moved(chromium)
    assert seen(chromium)["where"].startswith("step 5 of 5")
    assert chromium.execute_script("return document.getElementById('command').textContent") == COMMAND


@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize("images, steps, guided, channels", [(1, 1, True, 1), (1, 4, True, 3), (2, 1, False, 1)])
def test_one_step_and_one_image(chromium, tmp_path, images, steps, guided, channels, size):
    path = tmp_path / "explore.html"
    one = recorded(images, steps, guided=guided, channels=channels)
    write_page(path, [one], TITLE, COMMAND)
    opened(chromium, path, size)
    moved(chromium, step=steps - 1, psi=100)
    now = seen(chromium)
    assert now["where"].startswith(f"step {steps} of {steps} · t = 0")
    masked = int((one.arrays["attention_output.1" if guided else "attention_middle"][0, -1] > 1).sum())
    assert now["shares"][0].startswith(f"{masked} of ")
    assert len(now["pressed"]) == images and all(now["alts"])
    assert_readable(chromium, size, "light", TITLE)


def test_there_is_a_sheet_for_each_image():
    found = data_of(page([recorded(images=2, steps=5)], TITLE, COMMAND))
    assert found["columns"] == 3 and found["images"] == [10, 11] and len(found["sigma"]) == 5
    assert {len(one["sheets"]) for one in found["settings"][0]["pictures"].values()} == {2}
