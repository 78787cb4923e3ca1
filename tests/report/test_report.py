"""The report of invented runs: complete, partial, damaged, K = 3, and with text that would break a page."""

import base64
import io
import json
import re
from dataclasses import replace
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastasync.config import apply_settings
from fastasync.data.images import ImageSet
from fastasync.data.shards import read_index
from fastasync.encode import encode
from fastasync.errors import UserError
from fastasync.evaluation import load_figures, save_figures
from fastasync.presets import preset
from fastasync.report import comparison_table, write_report
from fastasync.report.curves import curves_png
from fastasync.report.html import page, settings_of
from fastasync.report.records import class_names, collect
from fastasync.report.samples_grid import COLUMNS, ROWS, _titles, samples_grid
from fastasync.report.schedule_plot import schedule_png
from fastasync.report.table import build_table, value_text
from fastasync.representations import Bundle, build
from fastasync.schedule import save_schedule, synchronous

VOID = {"meta", "img", "br"}
THREE = (
    "representations.names=texture,lowfreq,semantic",
    "representations.channels=4,3,4",
    "representations.roles=lags,free,leads",
)


class Page(HTMLParser):
    """Checks that tags nest, and collects texts and addresses."""

    def __init__(self, content: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def pictures(self):
        """The embedded pictures, decoded."""
        prefix = "data:image/png;base64,"
        assert all(address.startswith(prefix) for address in self.addresses)
        return [Image.open(io.BytesIO(base64.b64decode(a.removeprefix(prefix)))) for a in self.addresses]


def page_without_pictures(run) -> Page:
    """The page as it is before any picture can be drawn: quick."""
    records = collect(run)
    return Page(page(records, None, [None] * len(records), None))


def read_page(run) -> Page:
    return Page((run.path / "report.html").read_text(encoding="utf-8"))


def test_full_report(full_run):
    assert write_report(full_run) == full_run.path / "report.html"
    found, content = read_page(full_run), (full_run.path / "report.html").read_text()

    # self-contained: embedded pictures only, no script, nothing fetched by the style sheet
    sizes = [picture.size for picture in found.pictures()]
    assert len(sizes) == 5  # schedule, three grids, curves
    assert not {"script", "link", "iframe", "object"} & set(found.tags)
    assert not re.search(r"https?://|@import|url\(", content)
    assert len(content) < 3_000_000

    for name, low, high in (("schedule", 1000, 2000), ("curves", 1000, 2000), ("samples", 250, 800)):
        with Image.open(full_run.path / f"{name}.png") as picture:
            assert low < picture.width < high
            assert picture.size in sizes
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20  # not blank
    for baseline in full_run.baselines():
        assert (baseline.path / "samples.png").is_file()

    # every figure with its whole protocol beside it
    for run in (full_run, *full_run.baselines()):
        for figure in load_figures(run.figures_file):
            assert value_text(figure) in found.text
            assert figure.protocol.describe() in found.text

    for text in (
        "723,884",  # parameters of the preset's network
        "22.5 % of the run",  # 0.9 of a budget of 25 %
        "the optimum jumps",
        "negative: the loss wants texture first",
        "standard deviation of 0.0871",
        "2.902",  # the winner's score
        "1.357",  # KE
        "1.1, the least over all monotone lattice paths",
        "0.9731",  # the encoder's accuracy
        full_run.config.to_yaml(),
        "fastasync run --preset digits --out",
    ):
        assert text in found.text, text
    # texts from elsewhere come out as text
    assert "CPU <test>" in found.text
    assert "offset <0.3>" in found.text
    assert "<0.3>" not in content
    assert escape("offset <0.3>") in content


def test_report_is_reproducible(make_run):
    full_run = make_run("schedule.baselines=")
    write_report(full_run)
    names = ("schedule.png", "samples.png", "curves.png", "report.html")
    first = {name: (full_run.path / name).read_bytes() for name in names}
    write_report(full_run)
    assert first == {name: (full_run.path / name).read_bytes() for name in names}


def test_comparison_table_holds_the_stored_numbers(full_run):
    text = comparison_table(full_run)
    lines = text.splitlines()
    stored = {run.config.schedule.name: load_figures(run.figures_file) for run in (full_run, *full_run.baselines())}
    base = {(f.name, f.protocol.function_evaluations): f.value for f in stored["synchronous"]}
    for name, figures in stored.items():
        for evaluations in (18, 50):
            fid, kid = (f for f in figures if f.protocol.function_evaluations == evaluations)
            cells = next(line for line in lines if line.split()[:2] == [name, str(evaluations)]).split()
            assert cells[2] == f"{fid.value:.4g}"
            assert f"{kid.value:.4g}" in cells
            assert ("*" in cells) == (name == "learned")
            difference = f"{100 * (fid.value / base['fid', evaluations] - 1):+.1f}"
            assert (difference in cells) == (name != "synchronous")
    assert len([line for line in lines if line.split()[:1] in (["learned"], ["synchronous"], ["offset:0.3"])]) == 6
    assert "22.5 % of the planned run's training compute" in text
    assert "Fréchet distance" in lines[0]
    assert "FID" not in text  # these are a classifier's features
    assert max(map(len, lines)) < 120


def test_inception_features_are_called_fid(full_run):
    for run in (full_run, *full_run.baselines()):
        figures = [
            replace(f, protocol=replace(f.protocol, extractor="inception-2015-12-05"))
            for f in load_figures(run.figures_file)
        ]
        save_figures(run.figures_file, figures)
    assert " FID " in comparison_table(full_run).splitlines()[0]


def test_unequal_protocols_are_named(full_run):
    assert build_table(collect(full_run)).differences() == []
    other = full_run.baseline("offset:0.3")
    figures = [
        replace(f, protocol=replace(f.protocol, samples=39, versions={"torch": "2.11.0"}))
        for f in load_figures(other.figures_file)
    ]
    save_figures(other.figures_file, figures)
    table = build_table(collect(full_run))
    assert table.differences() == [
        "samples: 40 for learned, 39 for offset:0.3",
        "torch: 2.13.0 for learned, 2.11.0 for offset:0.3",
    ]
    assert "measured differently: samples: 40 for learned" in comparison_table(full_run)
    assert "samples: 40 for learned, 39 for offset:0.3" in page_without_pictures(full_run).text


def test_best_goes_up_for_precision_and_adaptive_steps_share_a_column(full_run):
    for run, precision, evaluations in zip((full_run, *full_run.baselines()), (0.5, 0.7, 0.6), (91.0, 80.0, 85.0)):
        fid = load_figures(run.figures_file)[0]
        protocol = replace(fid.protocol, integrator="dopri5", function_evaluations=evaluations)
        save_figures(run.figures_file, [replace(fid, name="precision", value=precision, protocol=protocol)])
    table = build_table(collect(full_run))
    (column,) = table.columns
    best = table.best(column)
    assert best is not None
    assert best.label == "synchronous"
    assert table.change(table.rows[0], column) == pytest.approx(100 * (0.5 / 0.7 - 1))
    assert table.differences() == []
    assert "91" in comparison_table(full_run).splitlines()[2].split()
    assert "91 NFE" in page_without_pictures(full_run).text


def test_nothing_has_run_yet(make_run):
    run = make_run(filled=False)
    write_report(run)
    found = read_page(run)
    assert found.addresses == []
    for stage in ("prepare", "probe", "train", "sample", "run"):
        assert f"fastasync {stage} --out {run.path}" in found.text
    assert not list(run.path.glob("*.png"))
    assert comparison_table(run) == f"no figures yet: fastasync run --out {run.path}"


def test_training_has_only_begun(make_run):
    run = make_run("schedule.baselines=")
    run.figures_file.unlink()
    for file in run.samples_folder.glob("*/samples.npz"):
        file.unlink()
    (run.path / "metrics.jsonl").write_text('{"step": 20, "loss": null, "loss/texture": 0.5}\n{"step": 40, "lo')
    write_report(run)
    found = read_page(run)
    assert len(found.addresses) == 2  # schedule and curves
    assert f"20 of {run.config.train.steps} steps" in found.text
    assert "No samples of learned yet" in found.text
    assert "No figures yet" in found.text


def test_fixed_schedule_needs_no_probe(make_run):
    run = make_run("schedule.name=offset:0.3", "schedule.baselines=")
    assert "The schedule is fixed (offset:0.3)" in page_without_pictures(run).text
    assert "probe" not in comparison_table(run)


@pytest.mark.parametrize("settings", [THREE, ("representations.names=texture", "representations.channels=4",
                                              "representations.roles=lags", "schedule.name=power:2")])  # fmt: skip
def test_other_numbers_of_representations(make_run, settings):
    run = make_run(*settings, "schedule.baselines=synchronous", records=130)
    write_report(run)
    assert len(read_page(run).pictures()) == 4
    with Image.open(run.path / "schedule.png") as picture:
        assert picture.height > 500


def test_joint_probe_without_surface_or_curl(make_run):
    """Estimator A has no surface, no candidates, and no curl."""
    run = make_run("schedule.baselines=")
    content = json.loads((run.probe_folder / "probe.json").read_text())
    content |= {"estimator": "A", "candidates": []}
    content["diagnostics"] = {"chosen": content["diagnostics"]["chosen"], "curl": None, "jumped": None, "steps": 30}
    (run.probe_folder / "probe.json").write_text(json.dumps(content))
    (run.probe_folder / "surface.npz").unlink()
    write_report(run)
    text = read_page(run).text
    assert "A: gradient through the jointly trained probe" in text
    assert "The starts" in text
    assert "curl" not in text


def test_candidates_by_the_loss_surface(make_run):
    """Estimator D has candidates and a surface, and no samples."""
    run = make_run("schedule.baselines=")
    content = json.loads((run.probe_folder / "probe.json").read_text())
    rows = [{"label": row["label"], "loss": 0.25, "score": -0.5, "lead": row["lead"], "kinetic_energy": 1.2,
             "schedule": row["schedule"]} for row in content["candidates"]]  # fmt: skip
    kept = {name: content["diagnostics"][name] for name in ("chosen", "curl", "jumped", "label")}
    (run.probe_folder / "probe.json").write_text(
        json.dumps(content | {"estimator": "D", "candidates": rows, "diagnostics": kept})
    )
    write_report(run)
    text = read_page(run).text
    assert "D: the gentlest of the candidates whose loss on the fitted surface is low" in text
    assert "Score: log loss + probe.loss_energy x KE. Shaded: chosen." in text
    assert "Fréchet distance of the probe's samples" not in text
    assert "0.25" in text


def test_a_run_that_did_not_start_from_scratch_says_so(make_run):
    run = make_run("schedule.baselines=synchronous")
    write_report(run)
    assert "not from scratch" not in read_page(run).text
    (run.path / "start.safetensors").write_bytes(b"weights")
    write_report(run)
    text = read_page(run).text
    assert "learned started from the weights in its start.safetensors, not from scratch." in text
    assert "synchronous started" not in text
    assert f"fastasync convert {run.path / 'start.safetensors'} {run.path} --to ours --preset digits" in text
    assert "note: learned started from the weights" in comparison_table(run)


def test_text_is_escaped_everywhere(make_run):
    run = make_run("data.root=<b>&'\"", "schedule.baselines=", folder="a <i> & $x$ 'b'")
    manifest = {"parts": {"<u>": {"<s>": 1.5}}, "identity": {"dataset": "<em>"}}
    (run.prepared / "prepared.json").write_text(json.dumps(manifest))
    found = page_without_pictures(run)  # tags nest
    assert not {"b", "i", "u", "s", "em"} & set(found.tags)
    assert "<b>&'" in found.text
    assert "<em>" in found.text


def test_names_with_dollar_signs_draw(make_run, tmp_path):
    path = tmp_path / r"$\frac$.json"  # as mathematics this is an error
    save_schedule(synchronous(("texture", "semantic")), path)
    run = make_run(f"schedule.name={path}", "schedule.baselines=")
    records = collect(run)
    assert records[0].label == r"$\frac$.json"
    assert schedule_png(records)
    assert curves_png(records)


def test_samples_grid_places_every_class(make_run):
    """Each row holds its class's images in order, pixel for pixel."""
    run = make_run("schedule.baselines=", filled=False)
    folder = run.samples_folder / "heun-9-x"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 40, 400)
    images = generator.integers(0, 256, (400, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "samples.npz", arr_0=images, labels=labels)
    grid = samples_grid(collect(run)[0])
    assert grid is not None
    assert (grid.shown, grid.classes) == (ROWS, 40)
    sheet = np.asarray(Image.open(io.BytesIO(grid.png)))
    top, side = sheet.shape[0] - ROWS * 67, 67
    left = sheet.shape[1] - min(COLUMNS, max(np.bincount(labels)[:ROWS])) * side
    for row in (0, 5, ROWS - 1):
        for column, index in enumerate(np.flatnonzero(labels == row)[:COLUMNS]):
            y, x = top + row * side, left + column * side
            np.testing.assert_array_equal(sheet[y : y + 64 : 8, x : x + 64 : 8], images[index])


def test_large_images_are_reduced(make_run):
    run = make_run("schedule.baselines=", filled=False)
    folder = run.samples_folder / "heun-9-x"
    folder.mkdir(parents=True)
    np.savez(folder / "samples.npz", arr_0=np.full((4, 256, 256, 3), 90, np.uint8), labels=np.array([0, 0, 1, 1]))
    grid = samples_grid(collect(run)[0])
    assert grid is not None
    width, height = Image.open(io.BytesIO(grid.png)).size
    assert 2 * 128 < width < 400
    assert 2 * 128 < height < 320


def test_latest_checkpoint_then_most_evaluations_is_shown(full_run):
    record = collect(full_run)[0]
    assert record.protocol["function_evaluations"] == 50
    protocol = full_run.samples_folder / "heun-9-0123abcd" / "protocol.json"
    protocol.write_text(json.dumps(json.loads(protocol.read_text()) | {"checkpoint_step": 1400}))
    assert collect(full_run)[0].protocol["function_evaluations"] == 18


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("figures.json", b"[{"),
        ("probe/probe.json", b"{"),
        ("schedule.json", b"{}"),
        ("prepared/prepared.json", b"[1]"),
        ("samples/heun-25-0123abcd/protocol.json", b"?"),
    ],
)
def test_damaged_files_are_named_and_nothing_is_overwritten(make_run, file, content):
    run = make_run("schedule.baselines=")
    (run.path / "report.html").write_text("before")
    (run.path / file).write_bytes(content)
    with pytest.raises(UserError) as caught:
        write_report(run)
    assert file.split("/")[-1] in str(caught.value)
    assert (run.path / "report.html").read_text() == "before"
    assert not list(run.path.glob("*.png"))


def test_damaged_samples_are_named(make_run):
    run = make_run("schedule.baselines=")
    path = run.samples_folder / "heun-25-0123abcd" / "samples.npz"
    np.savez(path, arr_0=np.zeros((3, 8, 8, 3), np.uint8), labels=np.arange(10), evaluations=np.array([50]))
    with pytest.raises(UserError, match=r"samples\.npz.*arr_0 ends before image 3"):
        samples_grid(collect(run)[0])


def test_settings_lead_back_to_the_configuration(config):
    changes = ["data.flip=true", "sample.classes=3,1", "schedule.baselines=", "train.lr=0.00037", "sample.steps=7,9"]
    changed = apply_settings(config, changes)
    found = settings_of(changed)
    assert len(found) == len(changes)
    assert apply_settings(preset("digits"), found) == changed
    assert settings_of(config) == []


# --- runs on a folder of latents ------------------------------------------------------------------------------------


def on_latents(make_run, root, *settings):
    on = (
        "data.dataset=latents",
        f"data.root={root}",
        "probe.estimator=B",
        "schedule.baselines=",
        "evaluate.features=inception",
    )
    return make_run(*on, *settings)


def test_classes_of_a_folder_of_latents_have_their_names(make_run, tmp_path):
    images = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    names = ("tench", "a <b>", "2", "drösche", "x" * 40, *"fghij")
    image_set = ImageSet(images, torch.arange(20) % 10, 10, names, "noise")
    folder = tmp_path / "latents"
    encode(image_set, Bundle([build("texture", (3, 16, 16), 4)]), folder, shard_size=16, progress=False)
    run = on_latents(make_run, folder)
    assert class_names(run) == names
    assert _titles([0, 2, 4, 12], names) == {0: "0 tench", 2: "2", 4: f"4 {'x' * 23}…", 12: "12"}
    named = samples_grid(collect(run)[0])
    write_report(run)
    text = Page((run.path / "report.html").read_text()).text
    assert "20 of 10 classes, both views" in text
    assert read_index(folder).statistics.fingerprint() in text
    assert "No preparation yet" not in text
    (folder / "index.json").unlink()  # the latents were moved, or are being encoded anew
    assert class_names(run) == ()
    numbered = samples_grid(collect(run)[0])
    assert Image.open(io.BytesIO(numbered.png)).width < Image.open(io.BytesIO(named.png)).width
    write_report(run)
    assert "encoding has not finished" in Page((run.path / "report.html").read_text()).text


def test_a_folder_without_an_index_has_numbers(make_run, tmp_path):
    folder = tmp_path / "sfd"
    folder.mkdir()
    save_file(
        {"latents": torch.zeros(1, 4, 4, 4), "labels": torch.zeros(1, dtype=torch.int64)}, folder / "a.safetensors"
    )
    run = on_latents(make_run, folder)
    assert class_names(run) == ()
    write_report(run)
    assert "made by" in Page((run.path / "report.html").read_text()).text


def test_precisions_of_sampling_have_columns_of_their_own(full_run):
    figures = load_figures(full_run.figures_file)
    fast = [
        replace(f, value=2 * f.value, protocol=replace(f.protocol, precision="fp8, bf16 autocast")) for f in figures
    ]
    save_figures(full_run.figures_file, [*figures, *fast])
    lines = comparison_table(full_run).splitlines()
    found = {line.split()[1] + (" fp8" if "fp8" in line else ""): line for line in lines if line.startswith("learned")}
    assert set(found) == {"18,", "50,", "18, fp8", "50, fp8"}
    assert f"{figures[0].value:.4g}" in found["18,"]
    assert f"{2 * figures[0].value:.4g}" in found["18, fp8"]


def test_a_baseline_with_the_runs_schedule_shares_its_figures_until_it_has_a_checkpoint(make_run):
    run = make_run("schedule.name=synchronous", "schedule.baselines=offset:0")
    assert [record.shared for record in collect(run)] == ["", "synchronous"]
    assert collect(run)[1].figures == collect(run)[0].figures
    (run.baselines()[0].path / "checkpoints" / "step_00000007").mkdir(parents=True)
    assert [record.shared for record in collect(run)] == ["", ""]
