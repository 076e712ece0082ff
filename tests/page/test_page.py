"""A run's page: made of its report's plain data, whole for any report, and every chart one that Vega-Lite takes."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
import vl_convert
from autos import run
from nets import SOON, ConvNet, batches, images, mlp

import fxrank
from fxrank.cli.main import main
from fxrank.page.graphs import before
from fxrank.page.render import in_notebook
from fxrank.page.runs import headline, run_page

TIMED = replace(SOON, speedup_threshold=0.0, objective="size")
"""With stacks in the page, whatever they take."""


class Elements(HTMLParser):
    """Names of the elements, the specifications in the page, and whether something comes from elsewhere."""

    def __init__(self, html):
        super().__init__()
        self.names, self.specs, self.from_elsewhere, self.rows = set(), {}, [], 0
        self._spec = None
        self.feed(html)

    def handle_starttag(self, name, attributes):
        given = dict(attributes)
        self.names.add(name)
        self.rows += name == "tr"
        self.from_elsewhere += [given[n] for n in ("src", "href") if n in given]
        self._spec = given["id"] if given.get("type") == "application/json" else None

    def handle_endtag(self, name):
        self._spec = None

    def handle_data(self, data):
        if self._spec is not None:
            self.specs[self._spec] = json.loads(data)


def drawn(spec):
    """The SVG that Vega makes of it. The list of the page that a chart hears is not there."""
    spec = json.loads(re.sub(r'"@\w+"', '"#333333"', json.dumps(spec)))
    for param in spec.get("params", ()):
        if "element" in (param.get("bind") or ()):
            del param["bind"]
    return vl_convert.vegalite_to_svg(spec | {"width": 600})


@pytest.fixture(scope="module")
def of_run():
    """The report of a run with a switch, as plain data that has been JSON."""
    torch.manual_seed(0)
    result = run(ConvNet(), batches(make=images), val_loader=[images(16, 9)], policy=TIMED)
    assert result.plan.R
    return json.loads(result.report.to_json())


def test_the_page_of_a_run_is_whole(of_run):
    html = run_page(of_run, "a run")
    found = Elements(html)
    assert found.from_elsewhere == [] and "http-equiv" not in html
    assert len(html.encode()) < 3e6
    ids = re.findall(r'<section id="(\w+)"', html)
    assert ids == ["training", "curves", "ranks", "spectra", "stacks", "cost", "decisions", "graph"]
    assert found.rows == 1 + len(of_run["plan"]["layers"])
    for layer in of_run["plan"]["layers"]:
        assert layer["reason"] in html
    assert re.findall(r'data-spec="([\w-]+)"', html) == list(found.specs)


def test_every_chart_is_drawn_and_shows_its_layers(of_run):
    specs = Elements(run_page(of_run)).specs
    pictures = {name: drawn(spec) for name, spec in specs.items()}
    assert len(pictures) == 12
    assert all(len(picture) > 2000 for picture in pictures.values())
    whole = " ".join(pictures.values())
    for layer in of_run["plan"]["layers"]:
        assert layer["name"] in whole
    rank = next(layer["rank"] for layer in of_run["plan"]["layers"] if layer["rank"])
    assert f"{rank} of " in whole and "switch, E = " in whole


def test_the_details_say_what_was_cut_and_what_became_of_it(of_run):
    details = of_run["details"]
    assert details["spectra"].keys() == of_run["R"].keys()
    for name, cut in details["spectra"].items():
        assert cut["rank"] == of_run["R"][name] and cut["rank"] in cut["ranks"]
        assert cut["left_out"] == sorted(cut["left_out"], reverse=True)
        assert cut["left_out"][0] == 1 and cut["left_out"][-1] < 1e-9
        assert len(cut["after"]) == cut["rank"] and cut["after"] == sorted(cut["after"], reverse=True)
    assert len(details["history"]) == of_run["epochs"]
    assert all("stable_ranks" not in row for row in details["history"])
    assert details["curves"]["ranks"].keys() == {layer["name"] for layer in of_run["plan"]["layers"]}


def test_before_the_rewrite_each_pair_was_one_node(of_run):
    nodes = of_run["details"]["graph"]["nodes"]
    first = before(nodes)
    pairs = [node["layer"] for node in nodes if node["layer"] is not None]
    assert sorted(pairs) == sorted([*of_run["R"]] * 2)
    assert [node["target"] for node in first if node["layer"] is not None] == list(dict.fromkeys(pairs))
    assert len(nodes) - len(first) == len(of_run["R"])
    assert all(place < number for number, node in enumerate(first) for place in node["inputs"])


def test_a_layer_that_is_called_twice_stays_two_nodes():
    def node(layer, *inputs):
        return {
            "name": "n",
            "op": "call_module",
            "target": "fc.u",
            "shape": [1],
            "inputs": list(inputs),
            "layer": layer,
        }

    nodes = [node(None), node("fc", 0), node("fc", 1), node(None, 2), node("fc", 3), node("fc", 4)]
    assert [one["inputs"] for one in before(nodes)] == [[], [0], [1], [2]]


def test_names_and_notes_are_text_and_no_elements(of_run):
    bad = "</script><b>x</b>"
    changed = json.loads(json.dumps(of_run).replace("conv2", "<b>2</b></script>"))
    changed["notes"] = [bad]
    found = Elements(run_page(changed, bad))
    assert "b" not in found.names
    assert len(found.specs) == 12


def test_what_is_no_number_is_left_out(of_run):
    changed = json.loads(json.dumps(of_run))
    changed["details"]["history"][1]["loss"] = float("nan")
    changed["details"]["curves"]["ranks"]["conv2"] = [float("inf")] * len(changed["details"]["curves"]["steps"])
    changed["val_accuracy"] = None
    specs = Elements(run_page(changed)).specs
    losses = specs["chart-0"]["layer"][0]["data"]["values"]
    assert len(losses) == 2 * of_run["epochs"] - 1
    html = run_page(
        changed | {"details": changed["details"] | {"curves": {"steps": [0], "ranks": {}, "full_ranks": {}}}}
    )
    assert 'id="curves"' not in html
    assert "conv2" not in {one["layer"] for one in specs["chart-2"]["layer"][0]["data"]["values"]}


def test_warnings_come_first_and_nothing_factorized_is_one():
    with pytest.warns(fxrank.NothingFactorizedWarning):
        result = run(mlp(), batches(), policy=replace(SOON, ratio=1.0))
    data = json.loads(result.report.to_json())
    data["notes"] = ["a note", "THE WEIGHTS ARE NOT FINITE: 'fc' holds NaN"]
    html = run_page(data)
    items = re.findall(r'<li class="(\w*)">(.*?)</li>', html)
    assert [kind for kind, _ in items] == ["warning", "warning", ""]
    assert items[0][1].startswith("NOTHING WAS FACTORIZED")
    assert headline(data).startswith("Nothing was factorized: the model is full-rank (")
    assert 'id="spectra"' not in html


def test_a_deep_model_stays_below_three_megabytes(of_run):
    layers = [of_run["plan"]["layers"][1] | {"name": f"stage.{i}.block.attention.projection"} for i in range(300)]
    steps = list(range(120))
    curve = [1 + 1 / (i + 3) for i in steps]
    details = of_run["details"] | {
        "curves": {
            "steps": steps,
            "ranks": {layer["name"]: curve for layer in layers},
            "full_ranks": {layer["name"]: 16 for layer in layers},
        },
        "graph": {
            "nodes": [
                {
                    "name": f"n{i}",
                    "op": "call_module",
                    "target": f"stage.{i}.x",
                    "shape": [8, 8],
                    "inputs": [i - 1] if i else [],
                    "layer": None,
                }
                for i in range(2000)
            ],
            "more": 12,
        },
    }
    html = run_page(of_run | {"plan": of_run["plan"] | {"layers": layers}, "details": details})
    assert len(html.encode()) < 3e6
    assert "12 further nodes are not drawn" in html


def test_a_report_of_an_earlier_fxrank_has_a_page_that_says_so(of_run):
    html = run_page({k: v for k, v in of_run.items() if k != "details"})
    assert "the report is of an earlier fxrank" in html
    assert re.findall(r'<section id="(\w+)"', html) == ["ranks", "cost", "decisions"]


def test_pairs_of_which_it_does_not_show_what_was_cut_are_counted(of_run):
    left = dict(list(of_run["details"]["spectra"].items())[1:])
    assert "what was cut is not shown" not in run_page(of_run)
    html = run_page(of_run | {"details": of_run["details"] | {"spectra": left}})
    assert "what was cut is not shown of 1 pairs" in html


def test_a_page_that_cannot_be_made_costs_no_other_file(tmp_path, monkeypatch, caplog):
    def fails(self, title="fxrank"):
        raise ZeroDivisionError("a fault of the page's own")

    monkeypatch.setattr(fxrank.Report, "to_html", fails)
    run(mlp(), batches(), output_dir=tmp_path)
    assert f"no page of the run: a fault of the page's own. `fxrank report {tmp_path}` writes it" in caplog.text
    files = {path.name for path in tmp_path.iterdir()}
    assert files >= {"model.safetensors", "plan.json", "report.json", "report.txt"} and "report.html" not in files


@pytest.mark.parametrize(("data", "word"), [({}, "plan"), ({"plan": []}, "parameters_before")])
def test_what_is_no_report_is_refused(data, word):
    with pytest.raises(ValueError, match=f"a page is made from a run's report, .* this has no {word}"):
        run_page(data)


def test_a_notebook_shows_it_in_a_frame_of_its_own(of_run):
    html = run_page(of_run)
    frame = Elements(in_notebook(html))
    assert frame.names == {"iframe"}


def test_the_report_saves_it_by_its_suffix(of_run, tmp_path):
    torch.manual_seed(0)
    report = run(ConvNet(), batches(make=images)).report
    report.save(tmp_path / "x.html")
    assert (tmp_path / "x.html").read_text(encoding="utf-8") == report.to_html()
    assert report._repr_html_() == in_notebook(report.to_html())


def test_a_missing_library_is_named(of_run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(ImportError, match="a page needs jinja2, which is not installed: pip install jinja2"):
        run_page(of_run)


# -- in a shell


def test_report_writes_the_page_of_a_folder(of_run, tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(of_run))
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert (folder / "report.html").read_text(encoding="utf-8") == run_page(of_run, "mine")
    assert main(["report", str(folder / "report.json"), "--output", str(tmp_path / "x.html")]) == 0
    assert (tmp_path / "x.html").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "a run's folder has a report.json"),
        ("{", "must be JSON as a run writes it"),
        ("[]", "a page is made from a run's report"),
    ],
)
def test_report_refuses_other_folders(text, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    assert main(["report", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
