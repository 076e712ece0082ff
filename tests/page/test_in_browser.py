"""The page in a real browser: it draws, sorts, filters, zooms and changes its colours, says nothing to the console, and fits a phone."""

import json
import time
from dataclasses import replace

import pytest
import torch
from autos import run
from nets import SOON, ConvNet, batches, images
from PIL import Image

from benchmarks import pictures
from benchmarks.pictures import missing, show
from fxrank.page.runs import run_page

TIMED = replace(SOON, speedup_threshold=0.0, objective="size")
"""With stacks in the page, whatever they take."""
pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # selenium leaves its own sockets to the garbage collector
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    report = run(ConvNet(), batches(make=images), val_loader=[images(16, 9)], policy=TIMED).report
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(run_page(json.loads(report.to_json()), "a run"), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chromium():
    with pictures.chromium() as driver:
        yield driver


def until(holds, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def column(chromium, number):
    script = (
        "return [...document.querySelectorAll('#decisions tbody tr')].filter(r => !r.hidden)"
        ".map(r => r.cells[arguments[0]].textContent)"
    )
    return chromium.execute_script(script, number)


@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_it_draws_all_its_charts_without_a_word_to_the_console(chromium, file, width, dark):
    show(chromium, file, width=width, dark=dark)
    assert chromium.get_log("browser") == []
    places = chromium.execute_script("return document.querySelectorAll('.chart').length")
    drawings = chromium.execute_script("return document.querySelectorAll('.chart svg').length")
    assert drawings == places == 12
    assert chromium.execute_script("return document.documentElement.scrollWidth") == width
    assert chromium.execute_script("return document.documentElement.dataset.theme") == ("dark" if dark else "light")
    widths = chromium.execute_script(
        "return [...document.querySelectorAll('.chart:not(.graph) svg')].map(s => s.getBoundingClientRect().width)"
    )
    assert all(100 < w <= width for w in widths)


def test_the_colours_change_with_the_button_and_charts_with_them(chromium, file):
    show(chromium, file)
    fill = "return getComputedStyle(document.querySelector('#stacks .chart svg .mark-rect path')).fill"
    light, back = (
        chromium.execute_script(fill),
        chromium.execute_script("return getComputedStyle(document.body).backgroundColor"),
    )
    chromium.execute_script("document.getElementById('theme').click()")
    assert chromium.execute_script(fill) != light
    assert chromium.execute_script("return getComputedStyle(document.body).backgroundColor") != back


def test_the_table_sorts_numbers_as_numbers_with_what_is_empty_last(chromium, file):
    show(chromium, file)
    in_order = column(chromium, 3)
    assert in_order != sorted(in_order, key=int), "the graph's own order would pass"
    chromium.execute_script("document.querySelectorAll('#decisions th')[3].click()")
    assert column(chromium, 3) == sorted(in_order, key=int)
    chromium.execute_script("document.querySelectorAll('#decisions th')[3].click()")
    assert column(chromium, 3) == sorted(in_order, key=int, reverse=True)
    for _ in range(2):  # ranks: kept layers have none
        chromium.execute_script("document.querySelectorAll('#decisions th')[4].click()")
        ranks = column(chromium, 4)
        assert "-" in ranks and all(rank != "-" for rank in ranks[: len(ranks) - ranks.count("-")])


def test_the_table_is_filtered_by_all_words(chromium, file):
    show(chromium, file)
    names = column(chromium, 0)
    script = (
        "const f = document.getElementById('filter'); f.value = arguments[0]; f.dispatchEvent(new Event('input'));"
        "return document.getElementById('shown').textContent"
    )
    assert chromium.execute_script(script, "CONV first") == f"1 of {len(names)}"
    assert column(chromium, 0) == ["conv1"]
    assert chromium.execute_script(script, "") == ""
    assert column(chromium, 0) == names


def test_the_graph_is_zoomed_and_the_list_of_layers_chooses_a_spectrum(chromium, file):
    show(chromium, file)
    size = "return document.querySelector('#graph .chart svg').getBoundingClientRect().height"
    before = chromium.execute_script(size)
    chromium.execute_script("document.querySelector('[data-zoom=\"1.25\"]').click()")
    assert chromium.execute_script(size) == pytest.approx(1.25 * before, rel=0.01)
    area = "return document.querySelector('#spectra .chart svg .mark-area path').getAttribute('d')"
    first = chromium.execute_script(area)
    chosen = chromium.execute_script(
        "const s = document.querySelector('#spectra select'); s.selectedIndex = s.options.length - 1;"
        "s.dispatchEvent(new Event('input', {bubbles: true})); return s.options.length"
    )
    assert chosen > 1, "one layer alone cannot be chosen from"
    until(lambda: chromium.execute_script(area) != first, 5)


def test_on_paper_it_is_light_and_the_buttons_are_away(chromium, file):
    show(chromium, file, dark=True)
    chromium.execute_script("dispatchEvent(new Event('beforeprint'))")
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert chromium.execute_script("return getComputedStyle(document.getElementById('theme')).display") == "none"
    assert chromium.execute_script("return document.documentElement.dataset.theme") == "light"
    chromium.execute_script("dispatchEvent(new Event('afterprint'))")
    assert chromium.execute_script("return document.documentElement.dataset.theme") == "dark"
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_pictures_are_taken_of_both_widths_and_themes(chromium, file, tmp_path):
    taken = pictures.main(["--page", str(file), "--site", str(file), "--output", str(tmp_path)])
    assert [path.name for path in taken] == [
        "report_wide_light.png",
        "report_wide_dark.png",
        "report_phone_light.png",
        "report_phone_dark.png",
        "docs_start.png",
    ]
    sizes = [Image.open(path).size for path in taken]
    assert [width for width, _ in sizes] == [1400, 1400, 400, 400, 1400]
    assert all(height <= pictures.TALLEST for _, height in sizes)
    corners = [Image.open(path).convert("L").getpixel((2, 2)) for path in taken[:2]]
    assert corners[0] > 200 > 60 > corners[1]


def test_a_page_that_is_never_drawn_is_not_waited_for_for_ever(chromium, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "PATIENCE", 0.2)
    (tmp_path / "x.html").write_text("<p>no page of a run</p>")
    with pytest.raises(TimeoutError, match=r"x\.html was not drawn within 0.2 s"):
        show(chromium, tmp_path / "x.html")
