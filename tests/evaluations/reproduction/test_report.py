"""The report of a reproduced table: its text, and what a reader of the page sees on a phone and on a desk."""

import copy
import functools
import json
import re

import numpy as np
import pytest
from browser import SIZES, TEXTS, contrast, opened

from evaluations.metrics import METRICS
from evaluations.reproduction.charts import Point, chart
from evaluations.reproduction.figures import figures
from evaluations.reproduction.markdown import markdown
from evaluations.reproduction.pictures import Pictures
from evaluations.reproduction.report import page, write_report
from evaluations.reproduction.sections import ShownSection
from guided_diffusion.errors import UserError

SHA256 = "3b7f9a0c" * 8
ORDER = ("fid", "sfid", "is", "precision", "recall", "dfid")


# A small table without published numbers, and one with them


def row(title, state="measured", why="", images=1000, evaluations=20.0, gradients=0.0, speed=7.36, **others):
    ran = state == "measured"
    return {"title": title, "guidance": title, "sampler": "DDPM", "state": state, "why": why, "images": images,
            "heads": "exact",
            "samples": f"{title}/samples.npz" if ran else None, "sha256": SHA256 if ran else None,
            "evaluations": evaluations, "gradients": gradients, "seconds": images / speed if ran else None,
            "images_per_second": speed if ran else None, **others}


def number(value, half=None, published=None, verdict="", versus=None):
    return {"value": value, "interval95": None if half is None else [value - half, value + 1.1 * half],
            "published": published, "difference": None if None in (value, published) else value - published,
            "verdict": verdict, "versus": versus}


def versus(difference, half, verdict):
    return {"difference": difference, "interval95": [difference - half, difference + half], "verdict": verdict}


def shown(name, metrics, verdict="", reasons=(), against=None):
    return {"row": name, "against": against, "verdict": verdict, "reasons": list(reasons), "metrics": metrics}


def measured(fid, score, precision, recall, first=None, half=0.09):
    """The numbers of a row, compared with those of the row `first`."""
    values = {"fid": (fid, half), "sfid": (1.9 * fid, 0.3), "is": (score, 0.08), "precision": (precision, 0.013),
              "recall": (recall, 0.015)}
    sign = {"fid": -1, "sfid": -1}

    def mark(word, value, width):
        if first is None:
            return None
        difference = value - first[word]["value"]
        verdict = "no difference" if abs(difference) < width / 2 else (
            "better" if sign.get(word, 1) * difference > 0 else "worse")
        return versus(difference, width / 2, verdict)

    return {word: number(value, width, versus=mark(word, value, width)) for word, (value, width) in values.items()}


@pytest.fixture(scope="module")
def small():
    first = measured(0.572, 7.151, 0.734, 0.689)
    rows = {"unguided": row("no guidance", images=5000, speed=14.6),
            "sag": row("SAG s = 0.1", images=5000, evaluations=40.0, speed=7.1),
            "cg": row("CG scale 2", images=5000, gradients=20.0, speed=9.93),
            "sag_cg": row("SAG s = 0.1 + CG scale 2", images=5000, evaluations=40.0, gradients=20.0, speed=5.44),
            "sag_0.5": row("SAG s = 0.5", evaluations=40.0, speed=7.05),
            "sag_1": row("SAG s = 1", evaluations=40.0, speed=7.02),
            "ddpm_250": row("no guidance, DDPM, 250 steps", "not run here", "left out of --rows", 500, 250.0)}
    return {
        "table": "fmnist32", "title": "Fashion-MNIST at 32x32, the bundled model fmnist32", "source": "", "note": "",
        "settings": "DDPM, 20 steps; seed 1",
        "command": "python scripts/reproduce.py fmnist32", "version": "0.1.0", "device": "2 CPU cores", "ranks": 2,
        "bootstrap": 1000, "network": {"name": "embedded classifier of Fashion-MNIST", "sha256": SHA256},
        "reference": {"file": "fmnist32_reference.npz", "images": 10000, "sha256": SHA256}, "rows": rows,
        "sections": [
            {"title": "Self-attention guidance and classifier guidance", "images": 5000, "against": "",
             "against_row": "unguided", "rows": [
                shown("unguided", first), shown("sag", measured(0.618, 7.144, 0.722, 0.692, first)),
                shown("cg", measured(0.461, 7.993, 0.778, 0.641, first)),
                shown("sag_cg", measured(0.507, 7.968, 0.751, 0.643, first))]},
            {"title": "The guidance scale s", "images": 1000, "against": "guide_scale", "against_row": "unguided",
             "rows": [
                shown("unguided", first, against=1.0),
                shown("sag", measured(0.61, 7.14, 0.722, 0.692, first), against=1.1),
                shown("sag_0.5", measured(0.88, 7.01, 0.651, 0.701, first), against=1.5),
                shown("sag_1", measured(1.953, 6.68, 0.524, 0.688, first, 0.31), against=2.0)]},
            {"title": "DDPM and DDIM", "images": 500, "against": "", "against_row": "unguided", "rows": [
                shown("unguided", first), shown("ddpm_250", {})]},
        ]}


@pytest.fixture(scope="module")
def published():
    why = "models/256x256_diffusion_uncond.pt is missing: python scripts/fetch_models.py 256x256_diffusion_uncond"
    source = {"published_source": "SAG, table 2"}
    rows = {"unguided": row("no guidance", images=50000, evaluations=250.0, speed=4.1, **source),
            "sag": row("SAG s = 0.1", images=50000, evaluations=500.0, speed=2.02, **source),
            "cg": row("CG scale 0.5", images=10000, evaluations=250.0, gradients=250.0, speed=2.7),
            "lsun": row("LSUN | <Church> & \"cats\"", "not run here", why, 50000, 250.0)}
    return {
        "table": "imagenet128", "title": "ImageNet 128x128", "source": "https://arxiv.org/abs/2210.00939",
        "note": "<script>alert(1)</script>", "settings": "DDPM, 250 steps", "chart": {"x": "evaluations", "y": "fid"},
        "command": "python scripts/reproduce.py imagenet128 --rows 'a & b'",
        "version": "0.1.0", "device": "one GPU", "ranks": 1, "bootstrap": 1000, "network": None, "reference": None,
        "rows": rows,
        "sections": [{"title": "ImageNet 128x128", "images": 50000, "against": "classifier_scale",
                      "against_row": "unguided", "rows": [
            shown("unguided", {"fid": number(5.93, 0.08, 5.91, "reproduced"),
                               "is": number(141.41, 2.4, 141.8, "reproduced"),
                               "precision": number(0.702, 0.004, 0.7, "reproduced"),
                               "recall": number(0.651, 0.004, 0.65, "reproduced")}, "reproduced", against=0.0),
            shown("sag", {"fid": number(5.62, 0.07, 5.11, "differs", versus(-0.31, 0.06, "better")),
                          "is": number(None, published=155.03, verdict="not run here")}, "differs", against=0.0),
            shown("cg", {"fid": number(3.313, 0.05, 2.97, "not comparable"),
                         "dfid": number(None, published=14.0, verdict="not run here"),
                         "precision": number(0.77, 0.004, 0.78, "not comparable"),
                         "recall": number(0.601, 0.004, 0.59, "not comparable")}, "not comparable",
                  ["10,000 images, published with 50,000", "attention heads exact, published with official"], 0.5),
            shown("lsun", {"fid": number(None, published=7.94, verdict="not run here")}, "not run here")]}]}


def images(seed, count=12, size=32):
    """(count, size, size, 3) uint8: blobs, somewhat different for another seed."""
    grid = np.linspace(-1, 1, size)
    rng = np.random.default_rng(0)
    centre, tint = rng.uniform(-0.4, 0.4, (count, 2)), rng.uniform(0.3, 1, (count, 3))
    width = rng.uniform(0.2, 0.6, count) * (1 + 0.1 * seed)
    distance = np.hypot(grid[None, :, None] - centre[:, :1, None], grid[None, None] - centre[:, 1:, None])
    bright = np.exp(-(distance / width[:, None, None])**4)
    return (255 * bright[..., None] * tint[:, None, None]).astype(np.uint8)


@pytest.fixture(scope="module")
def pictures(small):
    """Of the first two sections; one overlay."""
    return Pictures([(section["title"], {small["rows"][one["row"]]["title"]: images(seed)
                                         for seed, one in enumerate(section["rows"])})
                     for section in small["sections"][:2]],
                    [("The predicted image of SAG s = 0.1, and what its tokens attend to", np.concatenate(
                        list(images(0, 8)), axis=1))])


# Markdown


def test_markdown_of_a_small_table(small):
    text = markdown(small)
    assert text.startswith("# Fashion-MNIST at 32x32, the bundled model fmnist32\n")
    assert "| row | FID | sFID | Inception Score | precision | recall |" in text
    assert "| no guidance | 0.57 (0.48 to 0.67) | " in text
    assert "500 images of each row.\n" in text and "500 images of each row, compared" not in text
    assert "1,000 images of each row, compared with no guidance.\n" in text and "- *better, worse*: than" in text
    count = sum(bool(number["versus"]) for section in small["sections"] for row in section["rows"]
                for number in row["metrics"].values())
    assert f"of the {count} comparisons here, about {count / 20:.3g} would have one by chance" in text
    assert "1.95 (1.64 to 2.29), worse |" in text and "0.689 (0.674 to 0.705) |" in text
    assert "0.778 (0.765 to 0.792), better" in text and "7.14 (7.06 to 7.23), no difference" in text
    assert "published" not in text.lower() and "verdict" not in text and "comparable" not in text
    assert "| no guidance, DDPM, 250 steps | not run here | not run here |" in text
    assert "- no guidance, DDPM, 250 steps: not run here: left out of --rows" in text
    for fact in ("7, of which 6 were run here", "500 to 5,000 a row", "fmnist32_reference.npz, 10,000 images",
                 SHA256[:16], "95 %, of 1,000 resamplings", "python scripts/reproduce.py fmnist32",
                 "2 CPU cores, 2 ranks"):
        assert fact in text
    assert "| SAG s = 0.1 + CG scale 2 | 5,000 | 40 | 20 | 5.44 |" in text


def test_the_type_of_the_rows_is_said(small):
    mixed = "float32 (unguided, sag, cg, sag_cg, sag_0.5); bfloat16 (sag_1)"
    for types, said in ((["bfloat16"] * 7, "bfloat16"), (["float32"] * 5 + ["bfloat16", "float16"], mixed)):
        rows = {name: {**one, "dtype": dtype} for (name, one), dtype in zip(small["rows"].items(), types, strict=True)}
        assert f"- arithmetic: {said}\n" in markdown({**small, "rows": rows})
    assert "arithmetic" not in markdown(small)


def test_markdown_of_a_published_table(published):
    text = markdown(published)
    assert "| no guidance | FID | 5.91 | 5.93 (5.85 to 6.02) | +0.02 | reproduced |" in text
    assert "| 5.11 | 5.62 (5.55 to 5.70) | +0.51 | differs | -0.31 (-0.37 to -0.25), better |" in text
    assert "|  | Inception Score | 155.03 | not run here | - | not run here |" in text
    assert "| LSUN \\| <Church> & \"cats\" | FID | 7.94 | not run here | - | not run here |" in text
    assert "- CG scale 0.5: not comparable: 10,000 images, published with 50,000; attention heads exact" in text
    assert ": not run here: models/256x256_diffusion_uncond.pt is missing" in text
    assert "None" not in text and "nan" not in text
    assert "- network: not run here" in text and "- reference: not run here" in text
    assert "Published in: SAG, table 2." in text


def test_every_line_of_a_markdown_table_has_as_many_cells(small, published):
    for text in (markdown(small), markdown(published)):
        for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
            cells = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
            assert len(cells) == 1, table


def test_small_numbers_keep_two_digits_of_their_interval(small):
    few = copy.deepcopy(small)
    few["sections"][0]["rows"][0]["metrics"]["dfid"] = number(0.02134, 0.0012)
    few["sections"][0]["rows"][1]["metrics"]["dfid"] = number(-0.000001, 0.0012)
    text = markdown(few)
    assert "0.0213 (0.0201 to 0.0227)" in text and "| 0.0000 (-0.0012 to 0.0013) |" in text
    assert "0.643 (0.628 to 0.659), worse | - |" in text


TIMING = "What an image costs, and how many a rank made in a second"


@pytest.mark.parametrize(("machines", "sentence", "devices"), [
    ([("2 CPU cores", 2)] * 6, f"{TIMING} on 2 CPU cores, 2 ranks.", []),
    ([("one GPU", 1)] * 6, f"{TIMING} on one GPU, 1 rank; the metrics were computed on 2 CPU cores, 2 ranks.", []),
    ([("one GPU", 1)] * 2 + [("2 CPU cores", 2)] * 4,
     f"{TIMING} on the device beside it; the metrics were computed on 2 CPU cores, 2 ranks.",
     ["one GPU, 1 rank"] * 2 + ["2 CPU cores, 2 ranks"] * 4 + ["-"]),
    ([(None, None)] * 6, f"{TIMING} on an unknown device; the metrics were computed on 2 CPU cores, 2 ranks.", []),
])
def test_speeds_are_those_of_the_device_that_sampled(small, machines, sentence, devices):
    """The last row was not run here."""
    rows = {name: {**one, "device": device, "ranks": ranks}
            for (name, one), (device, ranks) in zip(small["rows"].items(), [*machines, (None, None)], strict=True)}
    text, shown = markdown({**small, "rows": rows}), page({**small, "rows": rows}, Pictures())
    timing, seen = text.partition("## Timing")[2], shown.partition("<h2>Timing</h2>")[2].partition("</table>")[0]
    assert sentence in timing and f"<p class=\"soft\">{sentence}</p>" in seen
    assert ("| row | device | images |" in timing) is (">device</th>" in seen) is bool(devices)
    if devices:
        cells = [line.split(" | ")[1] for line in timing.strip().splitlines()[4:]]
        assert cells == re.findall(r'<td class="words path">(.*?)</td>', seen) == devices


def test_rows_of_one_title_are_told_apart_in_the_table_of_timing(small):
    """Their sections tell them apart elsewhere."""
    rows = {**small["rows"], "cg": {**small["rows"]["cg"], "title": "SAG s = 0.1"}}
    shown = page({**small, "rows": rows}, Pictures()).partition("<h2>Timing</h2>")[2].partition("</table>")[0]
    timing = markdown({**small, "rows": rows}).partition("## Timing")[2]
    named = ["no guidance", "SAG s = 0.1 (sag)", "SAG s = 0.1 (cg)"]
    assert re.findall(r'<th scope="row">(.*?)</th>', shown)[:3] == named
    assert [line.split(" | ")[0] for line in timing.strip().splitlines()[4:7]] == [f"| {title}" for title in named]


# The page


@pytest.fixture(scope="module")
def pages(small, published, pictures):
    """The pages of `small` and of `published`."""
    return [page(small, pictures), page(published, Pictures([("A <b> & \"c\"", {"<i>": images(0)})],
                                                            [("<u>", images(0)[0])]))]


def test_the_page_escapes_and_loads_nothing(pages):
    text = pages[1]
    assert "&lt;script&gt;alert(1)" in text and "LSUN | &lt;Church&gt; &amp; &#34;cats&#34;" in text
    for word in ("<script", "<b> &", "<u>", "<i>", "None", "nan", "@import", "<iframe", "<object", "srcset"):
        assert word not in text
    loaded = re.findall(r"(?:src|href|action|poster)\s*=\s*[\"']([^\"']*)|url\(([^)]*)\)", text)
    assert loaded and all((one + other).startswith(("data:", "#")) for one, other in loaded)
    assert "https://arxiv.org/abs/2210.00939" in text


def test_the_page_without_pictures_or_any_number(small, published):
    for results in (small, published):
        bare = copy.deepcopy(results)
        for one in bare["rows"].values():
            one.update(state="not run here", why="no time", samples=None, sha256=None, seconds=None,
                       images_per_second=None)
        for section in bare["sections"]:
            for one in section["rows"]:
                one["metrics"] = {}
        text = page(bare, Pictures())
        assert "<img" not in text and text.count("not run here") > len(bare["rows"]) and "no time" in text
        assert not re.search(r"<b>|class=\"chart\"", text)
        assert "not run here" in markdown(bare)


@pytest.fixture(scope="module")
def report_of(request, tmp_path_factory):
    """The file of the report of `small`, which is its page, or of `published`."""
    @functools.cache
    def report_of(name):
        path = tmp_path_factory.mktemp(name) / "report.html"
        if name == "small":
            path.write_text(request.getfixturevalue("pages")[0], encoding="utf-8")
        else:
            write_report(path, request.getfixturevalue(name), Pictures())
        return path
    return report_of


def test_write_report_is_modest_whole_and_repeatable_also_of_results_from_json(small, pages, pictures, tmp_path):
    write_report(tmp_path / "report.html", json.loads(json.dumps(small)), pictures)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == pages[0] and len(pages[0].encode()) < 500_000
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(UserError, match="cannot be written"):
        write_report(tmp_path / "none" / "report.html", small, pictures)


def test_large_images_are_reduced(small):
    noise = np.random.default_rng(0).integers(0, 256, (6, 256, 256, 3), np.uint8)
    text = page({**small, "sections": small["sections"][-1:]}, Pictures([("DDPM and DDIM", {"no guidance": noise})]))
    assert f'style="width:{6 * 129}px"' in text and len(text) < 600_000


def test_published_results_survive_json(published, report_of):
    """So do those of the small table: see above."""
    assert page(json.loads(json.dumps(published)), Pictures()) == report_of("published").read_text(encoding="utf-8")


def test_charts_are_the_same_each_time_and_load_nothing(pages):
    points = [Point(1.0, 2.0, 0, label="one"), Point(2.0, 3.0, 1, y_interval=[2.5, 3.5], label="two"),
              Point(3.0, 1.0, 2, hollow=True, label="a title that is longer than one line of the legend can ever be")]
    first = chart(points, "x", "y", "three", joined=True)
    assert chart(points, "x", "y", "three", joined=True) == first
    assert "http" not in first.replace("http://www.w3.org/1999/xlink", "") and "<style" not in first
    ids = re.findall(r' id="([^"]*)"', pages[0])
    assert len(set(ids)) == len(ids)
    assert all(word in first for word in ("one", "two", "longer", 'aria-label="three"'))


def test_a_chart_of_one_point():
    text = chart([Point(1.0, 0.0)], "x", "<y>", "one & all")
    assert "&lt;y&gt;" in text and "one &amp; all" in text and "nan" not in text


def charts_of_shares(small, *shares):
    """The charts of a section whose rows have these (recall, precision)."""
    rows = [shown(name, {"recall": number(recall), "precision": number(precision)}, against=1.0 + place)
            for place, (name, (recall, precision)) in enumerate(zip(small["rows"], shares, strict=False))]
    section = {**small["sections"][1], "rows": rows}
    return {figure.caption.partition(";")[0]: figure.svg for figure in figures(ShownSection(section, small))}


def test_axes_end_where_no_share_can_be(small):
    """The margins of axes go beyond the numbers, and shares do not."""
    for shares, beyond in ((((0.0, 0.0), (0.004, 0.0)), "\N{MINUS SIGN}"),
                           (((1.0, 1.0), (0.99, 1.0)), "1.0[0-9]*[1-9]")):
        drawn = charts_of_shares(small, *shares)
        assert set(drawn) == {"Precision against recall", "recall against s", "precision against s"}
        for svg in drawn.values():
            labels = re.findall(r">([^<>]*[0-9][^<>]*)</text>", svg)
            assert labels and not [label for label in labels if re.search(beyond, label)]


def test_points_that_are_all_the_same_make_no_chart(small):
    assert "Precision against recall" not in charts_of_shares(small, (0.0, 0.0), (0.0, 0.0))


def test_a_difference_without_an_interval_stands_alone(small):
    one = copy.deepcopy(small)
    one["sections"][0]["rows"][1]["metrics"]["recall"]["versus"] = {"difference": 0.25, "interval95": None,
                                                                   "verdict": "no word"}
    assert re.search(r"no word</em> \+0\.2500</small></td>", page(one, Pictures()))


# What a reader sees

TABLES = """
return [...document.querySelectorAll('section')].map(section => ({
  heading: section.querySelector('h2').innerText,
  text: section.innerText,
  rows: [...section.querySelectorAll('tbody tr')].map(row => [...row.cells].map(cell => cell.innerText))}));
"""

IMAGES = """
return [...document.images].map(image => { const rect = image.getBoundingClientRect(); return {
  natural: image.naturalWidth, complete: image.complete, left: rect.left, width: rect.width, height: rect.height,
  rendering: getComputedStyle(image).imageRendering, alt: image.alt}; });
"""

GRIDS = """
return [...document.querySelectorAll('.scroll.white')].filter(box => box.querySelector('.strip')).map(box => {
  const left = element => element.getBoundingClientRect().left;
  const before = [...box.querySelectorAll('img')].map(image => [left(image), image.getBoundingClientRect().width]);
  const numbers = [...box.querySelectorAll('.numbers span')].map(one => [one.innerText, left(one),
                                                                         one.getBoundingClientRect().width]);
  box.scrollLeft = 150;
  const labels = [...box.querySelectorAll('.label')].map(one => left(one) - left(box));
  const moved = box.scrollLeft;
  box.scrollLeft = 0;
  return {before, numbers, labels, moved, wide: box.scrollWidth > box.clientWidth};
});
"""


@pytest.fixture(params=["small", "published"])
def report(request, report_of):
    """Results, and the file of their report."""
    return request.getfixturevalue(request.param), report_of(request.param)


def numbers_in(text):
    return re.findall(r"[-+]?\d+(?:\.\d+)?", text.replace("\N{MINUS SIGN}", "-").replace(",", ""))


def half_unit(word):
    """Half a unit of the last digit of a number."""
    return 0.501 * 10.0**-len(word.partition(".")[2])


def assert_shown(value, text):
    """`value` stands in the text, rounded to the digits written there."""
    def close(word):
        return abs(float(word) - value) <= min(half_unit(word), 0.05 * abs(value))

    assert any(map(close, numbers_in(text))), (value, text)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", list(SIZES))
def test_what_a_reader_sees(chromium, report, size, scheme):
    results, path = report
    width = SIZES[size][0]
    opened(chromium, path, size, scheme, ready=False)
    assert chromium.title == results["title"] and chromium.execute_script("return innerWidth") == width
    chromium.execute_script("document.querySelector('details').open = true")
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= width

    texts = chromium.execute_script(TEXTS)
    assert len(texts) > 50
    for text in texts:
        assert text["width"] > 0 and text["height"] > 0, text
        assert text["size"] >= 11.99, text
        assert contrast(text["ink"], text["paper"]) >= 4.5, text
    assert {text["paper"][0] > 128 for text in texts if text["text"] == results["title"]} == {scheme == "light"}

    assert_every_number_is_shown(results, chromium.execute_script(TABLES))
    assert_pictures_are_shown(chromium, size)
    loaded = chromium.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    assert chromium.get_log("browser") == []


def assert_every_number_is_shown(results, sections):
    for section, seen in zip(results["sections"], sections, strict=False):
        assert seen["heading"] == section["title"]
        rows = iter(seen["rows"])
        with_published = any(metric["published"] is not None for one in section["rows"]
                             for metric in one["metrics"].values())
        for one in section["rows"]:
            cells = next(rows)
            assert cells[0].startswith(results["rows"][one["row"]]["title"])
            if with_published:
                assert one["verdict"] in cells[0]
                for word in sorted(one["metrics"], key=ORDER.index):
                    assert_published(word, one["metrics"][word], next(rows))
            else:
                assert_compared(one["metrics"], cells)
            for reason in [*one["reasons"], results["rows"][one["row"]]["why"]]:
                assert reason in seen["text"]
    assert_timing(results, sections[-1])


def assert_compared(metrics, cells):
    if not metrics:
        assert cells[1:] == ["not run here"]
        return
    for metric, cell in zip(metrics.values(), cells[1:], strict=True):
        number, interval, *against = cell.split("\n")
        assert_shown(metric["value"], number)
        for value in metric["interval95"]:
            assert_shown(value, interval)
        assert len(against) == 2 * bool(metric["versus"])
        if against:
            assert against[0].startswith(metric["versus"]["verdict"])
            for value, text in zip((metric["versus"]["difference"], *metric["versus"]["interval95"]),
                                   (against[0], *against[1].split(" to ")), strict=True):
                word, = numbers_in(text)
                assert float(word) == pytest.approx(value, abs=half_unit(word))


def assert_timing(results, timing):
    assert timing["heading"] == "Timing"
    for one, cells in zip(results["rows"].values(), timing["rows"], strict=True):
        assert cells[0] == one["title"]
        for word, cell in zip(("evaluations", "gradients", "images_per_second"), cells[1:], strict=True):
            if one[word] is None:
                assert cell == "not run here"
            else:
                assert_shown(one[word], cell)


def assert_published(word, metric, cells):
    name, published, measured, difference = cells[:4]
    assert name == METRICS[word].label and float(published) == metric["published"]
    assert difference.split("\n")[-1] == metric["verdict"]
    if metric["value"] is None:
        assert measured == "not run here" and not numbers_in(difference)
    else:
        for value in (metric["value"], *metric["interval95"]):
            assert_shown(value, measured)
        assert float(numbers_in(difference)[0]) == pytest.approx(metric["difference"], abs=0.0051)
    if metric["versus"]:
        assert metric["versus"]["verdict"] in cells[4]
        assert_shown(metric["versus"]["difference"], cells[4])


def assert_pictures_are_shown(chromium, size):
    for image in chromium.execute_script(IMAGES):
        assert image["complete"] and image["natural"] > 0 and image["height"] > 0 and image["alt"]
        assert image["rendering"] == "pixelated" and image["width"] % image["natural"] == 0
    for grid in chromium.execute_script(GRIDS):
        (left, width), = {tuple(place) for place in grid["before"]}
        cell = width / len(grid["numbers"])
        assert [text for text, _, _ in grid["numbers"]] == [str(number) for number in range(12)]
        for column, (_, at, wide) in enumerate(grid["numbers"]):
            assert at == pytest.approx(left + column * cell, abs=0.5) and wide == pytest.approx(cell, abs=0.5)
        if size == "phone":
            assert grid["wide"] and grid["moved"] == 150
        assert all(0 <= label <= 20 for label in grid["labels"])
