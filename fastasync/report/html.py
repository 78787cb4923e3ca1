"""report.html: one page, readable on a phone, that needs no other file and no script."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import torch

from fastasync.config import Config, flatten
from fastasync.errors import UserError
from fastasync.evaluation.protocol import metric_title, today
from fastasync.model import parameter_count, train_flops
from fastasync.presets import preset
from fastasync.report.records import Record, latents_index, prepared_manifest, read_json, shared_notes
from fastasync.report.samples_grid import Grid
from fastasync.report.table import (
    SYNCHRONOUS,
    Table,
    build_table,
    probe_line,
    probe_share,
    value_text,
)
from fastasync.training import build_model
from fastasync.training.start import START

_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1d1d1f; background: #fff;
  max-width: 64rem; margin: 0 auto; padding: 1rem 1rem 4rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .6rem; border-top: 1px solid #ddd; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
.lead { font-size: 1.1rem; margin: .4rem 0 1.2rem; }
.wide { overflow-x: auto; margin: .6rem 0; }
.tall { max-height: 26rem; overflow: auto; margin: .6rem 0; }
.wide img { display: block; width: 100%; min-width: 40rem; height: auto; }
.gallery { display: flex; flex-wrap: wrap; gap: 1.2rem; }
.gallery > div { flex: 1 1 20rem; max-width: 48rem; }
.gallery img { display: block; max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #e5e5e5; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #999; vertical-align: bottom; }
table.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.facts th { text-align: left; font-weight: 600; vertical-align: top; }
.best { font-weight: 700; background: #e6f2ea; }
.small { font-size: .85rem; color: #555; }
.missing { color: #6b4a00; background: #fff6e0; padding: .5rem .8rem; border-radius: .3rem; }
details { margin: .35rem 0; }
summary { cursor: pointer; }
details > p, details > pre { margin: .3rem 0 .6rem 1.1rem; }
pre, code { font: .84rem/1.45 ui-monospace, Menlo, Consolas, monospace; }
pre { background: #f5f5f7; padding: .8rem; border-radius: .3rem; overflow-x: auto; }
"""


class Markup(str):
    """Text that is HTML already; everything else is escaped where it enters the page."""


def _text(value: object) -> str:
    return value if isinstance(value, Markup) else escape(str(value))


def _tag(name: str, content: object, css: str = "") -> Markup:
    opening = f'{name} class="{css}"' if css else name
    return Markup(f"<{opening}>{_text(content)}</{name}>")


def _join(parts: Iterable[object], between: str = "\n") -> Markup:
    return Markup(between.join(_text(part) for part in parts))


def _rows(rows: Iterable[Iterable[object]], cell: str = "td") -> Markup:
    return _join(_tag("tr", _join((_tag(cell, value) for value in row), "")) for row in rows)


def _grid(header: Sequence[object], rows: Iterable[Iterable[object]], css: str = "wide") -> Markup:
    table = _join([_tag("thead", _rows([header], "th")), _tag("tbody", _rows(rows))])
    return _tag("div", _tag("table", table), css)


def _facts(pairs: Iterable[tuple[str, object]]) -> Markup:
    rows = _join(_tag("tr", _join([_tag("th", name), _tag("td", value)], "")) for name, value in pairs)
    return _tag("table", rows, "facts")


def _details(summary: object, content: object) -> Markup:
    return _tag("details", _join([_tag("summary", summary), content]))


def _image(png: bytes, alt: str, css: str = "wide") -> Markup:
    data = base64.b64encode(png).decode()
    return _tag("div", Markup(f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'), css)


def _missing(what: str, stage: str, record: Record) -> Markup:
    command = f"fastasync {stage} --out {shlex.quote(str(record.run.path))}"
    return _tag("p", _join([f"No {what} yet: ", _tag("code", command), " makes it."], ""), "missing")


def _number(value: object) -> str:
    """A value of a probe's or a preparation's table as text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_number(item) for item in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def settings_of(config: Config) -> list[str]:
    """``section.field=value`` for what differs from the preset; `apply_settings` on the preset gives ``config`` back.

    Raises UserError when the configuration's preset is not a known one.
    """
    base = flatten(preset(config.preset))
    return [
        f"{name}={_setting(value)}"
        for name, value in flatten(config).items()
        if name != "preset" and value != base[name]
    ]


def _setting(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(_setting, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def page(
    records: Sequence[Record], schedule: bytes | None, samples: Sequence[Grid | None], curves: bytes | None
) -> str:
    """The whole page.  ``records`` and ``samples``: the run, then its baselines; a picture not yet there is None."""
    config, table = records[0].run.config, build_table(records)
    title = f"fastasync: {config.schedule.name} schedule on {config.data.dataset}"
    body = [
        _tag("h1", title),
        _tag("p", _headline(records, table), "lead"),
        _section("Comparison", _comparison(records, table)),
        _section("What was run", _what(records)),
        _section("Schedule", _schedule(records[0], schedule)),
        _section("Samples", _samples(records, samples)),
        _section("Training", _training(records[0], curves)),
        _section("Probe", _probe(records[0])),
        _section("Preparation", _preparation(records[0])),
        _section("Reproduce", _reproduce(records[0])),
    ]
    head = _join(
        [
            Markup('<meta charset="utf-8">'),
            Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            _tag("title", title),
            Markup(f"<style>{_CSS}</style>"),
        ]
    )
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{_join(body)}\n</body>\n</html>\n'


def _section(title: str, content: object) -> Markup:
    return _tag("section", _join([_tag("h2", title), content]))


def _headline(records: Sequence[Record], table: Table) -> str:
    """The run's first metric against synchronous, in a sentence."""
    found = []
    for column in table.columns:
        row = table.rows[0]
        change = table.change(row, column)
        if column.metric == table.columns[0].metric and change is not None:
            side = "below" if change < 0 else "above"
            figure = value_text(row.cells[column])
            best = table.best(column)
            beaten = "" if best is None or best is row else f" ({best.label} is best: {value_text(best.cells[column])})"
            found.append(f"{figure} at {column.where}, {abs(change):.1f} % {side} {SYNCHRONOUS}{beaten}")
    if not found:
        return f"Denoising {', '.join(records[0].run.config.representations.names)} along one schedule."
    share = probe_share(records[0])
    cost = "" if share is None else f" The probe spent {100 * share:.3g} % of the planned training compute."
    title = metric_title(table.columns[0].metric, table.extractor)
    return f"{title} of the {records[0].label} schedule: {'; '.join(found)} (one seed).{cost}"


def _comparison(records: Sequence[Record], table: Table) -> Markup:
    if not table.columns:
        return _missing("figures", "run", records[0])
    titles = [_join([metric_title(column.metric, table.extractor), column.where], "<br>") for column in table.columns]
    rows = []
    for row in table.rows:
        cells = [_tag("td", row.label)]
        for column in table.columns:
            if column not in row.cells:
                cells.append(_tag("td", "–"))
                continue
            figure, change = row.cells[column], table.change(row, column)
            lines = [_tag("span", value_text(figure))]
            if column.evaluations is None:
                lines.append(_tag("span", f"{figure.protocol.function_evaluations:g} NFE", "small"))
            lines.append(_tag("span", "" if change is None else f"{change:+.1f} %", "small"))
            cells.append(_tag("td", _join(lines, "<br>"), "best" if table.best(column) is row else ""))
        rows.append(_tag("tr", _join(cells, "")))
    head = _tag("thead", _rows([["schedule", *titles]], "th"))
    parts = [
        _tag("div", _tag("table", _join([head, _tag("tbody", _join(rows))])), "wide"),
        _tag(
            "p",
            f"Features: {table.extractor}. NFE: function evaluations per image. Shaded: the best of the column. Below "
            f"each figure its difference from the {SYNCHRONOUS} schedule. One seed each.",
            "small",
        ),
    ]
    parts += [_tag("p", f"{sentence}.", "small") for sentence in shared_notes(records)]
    faults = table.differences()
    if faults:
        listed = _join((_tag("li", fault) for fault in faults), "")
        parts.append(_tag("p", "Not measured alike: these differ in more than the schedule.", "missing"))
        parts.append(_tag("ul", listed))
    parts.append(_tag("h3", "Every figure with its protocol"))
    for row in table.rows:
        for column, figure in row.cells.items():
            summary = f"{row.label}, {column.where}: {metric_title(figure.name, table.extractor)} {value_text(figure)}"
            parts.append(_details(summary, _tag("p", figure.protocol.describe(), "small")))
    return _join(parts)


def _what(records: Sequence[Record]) -> Markup:
    record, config = records[0], records[0].run.config
    reps, model, train = config.representations, config.model, config.train
    with torch.device("meta"):
        network = build_model(config)
    flops = train_flops(network) * train.batch * train.steps
    shape = "" if model.size != "custom" else f" (depth {model.depth}, width {model.width}, {model.heads} heads)"
    hardware = dict.fromkeys(figure.protocol.hardware for each in records for figure in each.figures)
    dates = sorted({figure.protocol.date for each in records for figure in each.figures})
    reached = record.metrics[-1]["step"] if record.metrics else 0
    parts = ", ".join(
        f"{name} ({channels} channels, {role})" for name, channels, role in zip(reps.names, reps.channels, reps.roles)
    )
    versions = read_json(record.run.path / "versions.json")
    return _facts(
        [
            ("preset", config.preset),
            ("data", config.data.dataset),
            ("representations", f"{parts}, on a {reps.grid}x{reps.grid} grid"),
            ("model", f"LightningDiT {model.size}/{model.patch}{shape}"),
            ("parameters", f"{parameter_count(network):,}"),
            ("training", f"{reached:,} of {train.steps:,} steps of {train.batch} images, {flops:.3g} FLOPs planned"),
            ("objective", f"{config.objective.mode}, density {config.objective.density}"),
            ("schedules", ", ".join(each.label for each in records)),
            ("probe", probe_line(record) or "none"),
            ("sampled on", ", ".join(hardware) or "–"),
            ("measured", ", ".join(dates) or "–"),
            ("report of", today()),
            ("versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or "–"),
        ]
    )


def _schedule(record: Record, picture: bytes | None) -> Markup:
    if picture is None or record.schedule is None:
        return _missing("schedule", "probe", record)
    text = (
        "Colour: schedule. Line: representation. Circles: s = 0.25, 0.5, 0.75. "
        f"{record.label}: {record.schedule.kind} {record.schedule.fingerprint}."
    )
    if record.schedule.count > 1:
        lead, first, last = record.schedule.lead(), record.schedule.names[0], record.schedule.names[-1]
        ahead, behind = (last, first) if lead >= 0 else (first, last)
        text += f" In it {ahead} leads {behind} by at most {abs(lead):.3f}."
    if record.probe is not None and record.probe.surface and record.schedule.count == 2:
        text += " Grey: the error that the probe fitted, darker is larger."
    return _join(
        [_image(picture, "local times over global time, and the path in the unit square"), _tag("p", text, "small")]
    )


def _samples(records: Sequence[Record], grids: Sequence[Grid | None]) -> Markup:
    pictures, parts = [], []
    for number, (record, grid) in enumerate(zip(records, grids)):
        if grid is None:
            parts.append(_missing(f"samples of {record.label}", "sample" if number == 0 else "run", records[0]))
            continue
        more = "" if grid.shown == grid.classes else f" The first {grid.shown} of {grid.classes} classes."
        text = f"{record.label}: one class in each row, in the order of generation, not selected.{more}"
        picture = _image(grid.png, f"samples of {record.label}, a class in each row", "")
        pictures.append(_tag("div", _join([picture, _tag("p", text, "small")])))
    seeds = {record.protocol.get("seed") for record, grid in zip(records, grids) if grid is not None}
    if len(seeds) == 1 and sum(grid is not None for grid in grids) > 1:
        parts.append(_tag("p", "The same place in each grid starts from the same noise.", "small"))
    return _join([_tag("div", _join(pictures), "gallery"), *parts])


def _training(record: Record, picture: bytes | None) -> Markup:
    if picture is None:
        return _missing("training", "train", record)
    text = (
        "A loss is taken along its own schedule's path: a lower one does not mean better samples. Thick: "
        "this run; curves of many records are moving means. Distances (FID, KID): lower is better; thin lines are the "
        "metric's own spread."
    )
    return _join([_image(picture, "losses, gradient norm, speed and figures of merit"), _tag("p", text, "small")])


_NAMES = {"objective": "J", "kinetic_energy": "KE", "lam": "λ", "beta": "β", "lead": "lead", "same_sign": "same sign"}
_LEFT_OUT = ("schedule", "reached", "history")


def _table_of(rows: Sequence[Mapping[str, Any]], css: str = "wide") -> Markup:
    keys = [key for key in rows[0] if key not in _LEFT_OUT]
    values = ([_number(row.get(key)) for key in keys] for row in rows)
    return _grid([_NAMES.get(key, key.replace("_", " ")) for key in keys], values, css)


def _probe(record: Record) -> Markup:
    if record.label != "learned":
        return _tag("p", f"The schedule is fixed ({record.label}): nothing was learned.")
    if record.probe is None:
        return _missing("probe", "probe", record)
    probe, budget, found = record.probe, record.probe.budget, record.probe.diagnostics
    allowed = record.run.config.probe.budget
    text = {
        "A": "gradient through the jointly trained probe",
        "B": "minimum of J over the fitted loss surface",
        "C": "the gentlest of the candidates whose samples from the probe are close to the data",
        "D": "the gentlest of the candidates whose loss on the fitted surface is low",
    }[probe.estimator]
    facts: list[tuple[str, object]] = [("estimator", f"{probe.estimator}: {text}")]
    if budget:
        share = probe_share(record) or 0.0
        facts += [
            ("planned", f"{budget['limit_flops']:.4g} FLOPs, {100 * allowed:.3g} % of the run"),
            ("spent", f"{budget['spent_flops']:.4g} FLOPs, {100 * share:.3g} % of the run"),
            ("wall time", f"{budget['total_seconds']:.3g} s"),
        ]
    chosen = {key: value for key, value in (found.get("chosen") or {}).items() if key not in _LEFT_OUT}
    facts += [(_NAMES.get(key, key.replace("_", " ")), _number(value)) for key, value in chosen.items()]
    for row in found.get("curl") or []:
        first = "neither" if row["first"] is None else row["first"]
        sign = "0" if not row["sign"] else "positive" if row["sign"] > 0 else "negative"
        extent = f"integral {row['integral']:.3g}, {100 * row['same_sign']:.0f} % of one sign"
        facts.append((f"curl, {' and '.join(row['pair'])}", f"{sign}: the loss wants {first} first ({extent})"))
    if found.get("jumped") is not None:
        facts.append(
            ("jump", "the optimum jumps between neighbouring β" if found["jumped"] else "none between neighbouring β")
        )
    if "oracle" in found:
        facts.append(("oracle", f"loss {found['oracle']['value']:.4g}, the least over all monotone lattice paths"))
    parts: list[object] = [_facts(facts)]
    if budget:
        seconds = budget["seconds"]
        purposes = list(dict.fromkeys([*budget["flops"], *seconds]))
        rows = [[name, f"{budget['flops'].get(name, 0.0):.3g}", _number(seconds.get(name, 0.0))] for name in purposes]
        parts += [_tag("h3", "Where its compute went"), _grid(["purpose", "FLOPs", "seconds"], rows)]
    if probe.sweep:
        title = {"A": "The starts", "B": "Sweep over β"}.get(probe.estimator, "What B would choose: its sweep over β")
        parts += [_tag("h3", title), _table_of(probe.sweep)]
    if probe.candidates:
        parts += [_tag("h3", "Candidates"), _candidates(probe.candidates, found)]
    return _join(parts)


def _candidates(candidates: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> Markup:
    """C's and D's table, the chosen one shaded, and what separates two of C's scores from noise."""
    sampled = "samples" in candidates[0]
    rows = []
    for row in candidates:
        measured = [f"{row['samples']:,}", _number(row.get("distance"))] if sampled else [_number(row["loss"])]
        numbers = (_number(row.get(name)) for name in ("lead", "kinetic_energy", "score"))
        values = (row["label"], *measured, *numbers)
        css = "best" if row["label"] == found.get("label") else ""
        rows.append(_tag("tr", _join((_tag("td", value, css) for value in values), "")))
    columns = ["schedule", *(["samples", "distance"] if sampled else ["loss"]), "lead", "KE", "score"]
    head = _tag("thead", _rows([columns], "th"))
    noise = found.get("noise")
    text = "Loss on the fitted surface. Score: log loss + probe.loss_energy x KE. Shaded: chosen."
    if sampled:
        text = (
            f"Fréchet distance of the probe's samples in the frozen encoder's features ({found.get('method')}, "
            f"{found.get('steps_of_sampler')} steps); those of fewer samples are larger for that alone. "
            "Score: log distance + probe.energy x KE. Shaded: chosen."
        )
    if noise is not None:
        text += f" Noise: the difference between the best two has a standard deviation of {noise:.3g}."
    return _join(
        [_tag("div", _tag("table", _join([head, _tag("tbody", _join(rows))])), "tall"), _tag("p", text, "small")]
    )


def _preparation(record: Record) -> Markup:
    if record.run.config.data.dataset == "latents":
        return _latents(record)
    manifest = prepared_manifest(record.run)
    if not manifest:
        return _missing("preparation", "prepare", record)
    rows = []
    for file, part in manifest.get("parts", {}).items():
        for name, value in part.items():
            if isinstance(value, float):
                rows.append([file.removesuffix(".safetensors"), name, _number(value)])
    identity = manifest.get("identity", {})
    facts = [
        (name, _number(identity[name]))
        for name in ("dataset", "classes", "image shape", "images", "seed")
        if name in identity
    ]
    if "statistics_fingerprint" in manifest:
        facts.append(("statistics", manifest["statistics_fingerprint"]))
    parts = [_facts(facts)]
    if rows:
        parts.append(_grid(["part", "figure", "value"], rows))
    return _join(parts)


def _latents(record: Record) -> Markup:
    """The folder of latents that the run is trained on."""
    folder = ("folder of latents", record.run.config.data.root)
    try:
        index = latents_index(record.run)
    except UserError as error:
        return _facts([folder, ("not readable now", error)])
    if index is None:
        return _facts([folder, ("made by", "SFD or LightningDiT: nothing else is recorded in it")])
    made = index.encoding
    parts = zip(made.names, made.channels, made.fingerprints)
    return _facts(
        [
            folder,
            ("images", f"{made.count:,} of {len(made.class_names):,} classes" + (", both views" if made.flip else "")),
            ("bad files left out", f"{made.left_out:,}"),
            ("representations", ", ".join(f"{name} ({width} channels, {mark[:12]})" for name, width, mark in parts)),
            (
                "stored as",
                f"{made.dtype}, on a {made.grid}x{made.grid} grid, from images of side {made.image_shape[1]}",
            ),
            ("REPA features", made.features[:12] or "none stored"),
            ("statistics", index.statistics.fingerprint()),
        ]
    )


def _reproduce(record: Record) -> Markup:
    config, path = record.run.config, shlex.quote(str(record.run.path))
    try:
        settings = "".join(f" --set {shlex.quote(setting)}" for setting in settings_of(config))
        named = f" --preset {shlex.quote(config.preset)}{settings}"
    except UserError:  # a configuration written by hand: the folder itself holds it
        named = ""
    command = f"fastasync run{named} --out {path}"
    if (start := record.run.path / START).is_file():
        command = f"fastasync convert {shlex.quote(str(start))} {path} --to ours{named}\n{command}"
    return _join(
        [
            _tag("pre", command),
            _tag(
                "p",
                "In this folder the same command says that each stage is done; name another one to run it again.",
                "small",
            ),
            _details("config.yaml", _tag("pre", config.to_yaml())),
        ]
    )
