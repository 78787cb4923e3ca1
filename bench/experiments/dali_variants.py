"""What limits decoding JPEGs by DALI on a GPU: the loader's pipeline, and each of its costs taken away or put back.

``python -m bench.experiments.dali_variants`` on a GPU; ``--rehearse`` runs every variant on a CPU at a tiny size, where
the times mean nothing.  500 x 375 JPEGs of quality 90 and 95 with 4:2:0 chroma go to ADM's crop of 256; each variant's
crops are compared with Pillow's before it is timed (least and median PSNR).

Variants called ``pipeline`` get their files from memory, so that reading them is a row of its own (``files``);
``loader`` is the whole DaliLoader.  ``before`` is the pipeline as it was until 2026-11-25: chroma interpolated, sizes
read by DALI, three conditional halvings in a row, the whole image resized and then cropped.  A pipeline is built, runs,
and is dropped before the next; the first is repeated at the end, to show how much the machine moved.  Those that name
no chroma interpolate it, as the loader does (rows of before 2026-11-26 12:00 repeat it).
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness import RESULTS, Bench, Row, WrongResult, device_name, summarize, write_rows
from bench.subjects.data import DECIBELS, psnr, write_jpegs
from fastasync.errors import require
from fastasync.images import ImageSource, open_images
from fastasync.images.dali_loader import HALVINGS, READERS, DaliLoader, Feed, Form, _halve_both, _Taker, build, feed_of
from fastasync.images.loader import read_ahead

SIZE = 256
WARM = 4  # batches: more than a pipeline holds


class Setting(NamedTuple):
    """Sizes of a run: images, a batch, batches in a round, rounds, threads of DALI and of the readers."""

    images: int
    batch: int
    batches: int
    rounds: int
    threads: int


class Variant(NamedTuple):
    """``make(source, setting, device)``: batches without end, uint8 [b, 3, S, S], or lists that are not compared."""

    name: str
    make: Callable[[ImageSource, Setting, torch.device], Iterator[Any]]
    compared: bool = True
    large: int = 0  # every so manyth image is twice too large
    setting: dict[str, float] = {}  # noqa: RUF012 (never changed): factors of the setting's fields


def feeds(source: ImageSource, setting: Setting) -> Iterator[Feed]:
    """The source's files from memory, batch after batch without end."""
    loader = DaliLoader(source, SIZE, (), setting.batch)
    batches = torch.arange(len(source)).split(setting.batch)
    return itertools.cycle([feed_of(loader._files(batch.tolist()), SIZE) for batch in batches])


def from_memory(form: Form) -> Callable[[ImageSource, Setting, torch.device], Iterator[Tensor]]:
    def make(source: ImageSource, setting: Setting, device: torch.device) -> Iterator[Tensor]:
        pipeline = build(feeds(source, setting), SIZE, setting.batch, setting.threads, device, form)
        take = _Taker(device)
        while True:
            yield take(pipeline.run()[0])

    return make


def other_pipeline(steps: Callable[..., Any], form: Form, images: bool = True) -> Any:
    """As ``from_memory``, for ``steps(dali, decoded, encoded)`` -> what the pipeline gives instead of the crops."""

    def make(source: ImageSource, setting: Setting, device: torch.device) -> Iterator[Any]:
        dali: Any = require("nvidia.dali", "dali")
        on_gpu = device.type == "cuda"
        files = (feed.files for feed in feeds(source, setting))
        engines = {"hw_decoder_load": form.hw_load, "jpeg_fancy_upsampling": form.fancy} if on_gpu else {}

        @dali.pipeline_def(enable_conditionals=True)
        def pipeline() -> Any:
            encoded = dali.fn.external_source(source=files, dtype=dali.types.UINT8, ndim=1, batch=True, no_copy=True)
            kind = "mixed" if on_gpu else "cpu"
            decoded = dali.fn.decoders.image(encoded, device=kind, adjust_orientation=False, **engines)
            return steps(dali, decoded, encoded)

        made = pipeline(
            batch_size=setting.batch,
            num_threads=setting.threads,
            device_id=torch.cuda.current_device() if on_gpu else None,
            prefetch_queue_depth=form.depth,
        )
        made.build()
        while True:
            (found,) = made.run()
            yield torch.from_dlpack(found.as_tensor()).clone() if images else found

    return make


def nothing(dali: Any, decoded: Any, encoded: Any) -> Any:
    return decoded


def before(halving: bool) -> Callable[..., Any]:
    """The steps after the decoder as they were; without ``halving`` they have no branches."""

    def steps(dali: Any, image: Any, encoded: Any) -> Any:
        fn, types = dali.fn, dali.types
        if halving:
            shape = fn.peek_image_shape(encoded, dtype=types.INT32, adjust_orientation=False)
            height, width = shape[0], shape[1]
            for _ in range(HALVINGS):
                if dali.math.min(height, width) >= 2 * SIZE:
                    image, height, width = _halve_both(dali, image, height, width)
                else:
                    height = height + 0  # both branches must assign
        image = fn.resize(
            image, resize_shorter=SIZE, interp_type=types.INTERP_CUBIC, antialias=True, subpixel_scale=False
        )
        return fn.crop_mirror_normalize(
            image, crop=(SIZE, SIZE), rounding="truncate", dtype=types.UINT8, output_layout="CHW", mean=[0.0] * 3,
            std=[1.0] * 3,
        )  # fmt: skip

    return steps


def loader(form: Form) -> Callable[[ImageSource, Setting, torch.device], Iterator[Tensor]]:
    def make(source: ImageSource, setting: Setting, device: torch.device) -> Iterator[Tensor]:
        batches = itertools.cycle(torch.arange(len(source)).split(setting.batch))
        for batch in DaliLoader(source, SIZE, batches, setting.batch, setting.threads, device, form):
            yield batch.images

    return make


def files(source: ImageSource, setting: Setting, device: torch.device) -> Iterator[Any]:
    """Read and their headers parsed, as the loader does it."""
    read = DaliLoader(source, SIZE, (), setting.batch)._files
    batches = itertools.cycle(torch.arange(len(source)).split(setting.batch))
    for _, (found,) in read_ahead(batches, lambda indices: [read(indices)], READERS, 1):
        yield found


def variants() -> list[Variant]:
    """In order of importance in a limited time."""
    ours, repeated = Form(), Form(fancy=False)
    first = Variant("before, pipeline", other_pipeline(before(True), ours))
    return [
        first,
        Variant("before without interpolated chroma", other_pipeline(before(True), repeated)),
        Variant("before without branches", other_pipeline(before(False), ours)),
        Variant("before without both", other_pipeline(before(False), repeated)),
        Variant("decoder alone", other_pipeline(nothing, ours, images=False), compared=False),
        Variant("decoder alone, repeated chroma", other_pipeline(nothing, repeated, images=False), compared=False),
        Variant("pipeline", from_memory(ours)),
        Variant("pipeline, repeated chroma", from_memory(repeated)),
        Variant("pipeline without the branch", from_memory(ours._replace(halving=False))),
        Variant("files", files, compared=False),
        Variant("loader", loader(ours)),
        *(
            Variant(f"pipeline, {load:.0%} to the engines", from_memory(ours._replace(hw_load=load)))
            for load in (1.0, 0.8, 0.65, 0.5)
        ),
        Variant("pipeline, 1 in 16 images twice too large", from_memory(ours), large=16),
        Variant("pipeline, buffers for 1024 x 1024", from_memory(ours._replace(hint=1024))),
        Variant("pipeline, depth 3", from_memory(ours._replace(depth=3))),
        Variant("pipeline, half the batch", from_memory(ours), setting={"batch": 0.5, "batches": 2}),
        Variant("pipeline, half the threads", from_memory(ours), setting={"threads": 0.5}),
        Variant("pipeline, twice the threads", from_memory(ours), setting={"threads": 2}),
        Variant("loader, repeated chroma", loader(repeated)),
        Variant("loader, half the threads", loader(ours), setting={"threads": 0.5}),
        Variant("loader, depth 3", loader(ours._replace(depth=3))),
        Variant("loader, 1 in 16 images twice too large", loader(ours), large=16),
        first._replace(name="before, pipeline, again"),
    ]


def measure(bench: Bench, variant: Variant, source: ImageSource, expected: Tensor, setting: Setting) -> Row:
    """Compare, time and record one variant.  Raises WrongResult."""
    factors = {name: max(1, int(getattr(setting, name) * factor)) for name, factor in variant.setting.items()}
    setting = setting._replace(**factors)
    batches = variant.make(source, setting, bench.device)
    note = f"{setting.threads} threads"
    if variant.compared:
        found = torch.cat([next(batches).cpu() for _ in range(setting.images // setting.batch)])
        decibels = psnr(found, expected)
        least = DECIBELS["dali gpu" if bench.device.type == "cuda" else "dali cpu"]
        least = min(least, 46.0) if variant.large else least  # halved images: as tests/images/test_dali.py has it
        if not decibels.min() >= least:
            raise WrongResult(f"{decibels.min():.1f} dB to Pillow's crop, must be {least} or more")
        note += f", PSNR to Pillow's {decibels.min():.1f}, median {decibels.median():.1f} dB"
    for _ in range(WARM):
        next(batches)
    times = []
    for _ in range(setting.rounds):
        bench.synchronize()
        start = time.perf_counter()
        for _ in range(setting.batches):
            next(batches)
        bench.synchronize()
        times.append((time.perf_counter() - start) * 1e3 / setting.batches)
    batches.close()  # type: ignore[attr-defined]
    shape, times_of = f"[{setting.batch}, 3, {SIZE}, {SIZE}]", summarize(times)
    return bench.add("dali", "JPEG to 256", variant.name, shape, "uint8", times_of, images=setting.batch, note=note)


def compare(bench: Bench, setting: Setting, names: Sequence[str] = ()) -> list[str]:
    """Every variant (or those called ``names``); what failed.  One failure does not hide the others."""
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        sources: dict[int, tuple[ImageSource, Tensor]] = {}
        for variant in variants():
            if (names and variant.name not in names) or bench.time_is_up(variant.name):
                continue
            if variant.large not in sources:
                source = write_jpegs(Path(folder) / str(variant.large), setting.images, variant.large)
                crops = [batch.images for batch in open_images(source, SIZE, setting.batch, "pil")]
                sources[variant.large] = source, torch.cat(crops)
            try:
                measure(bench, variant, *sources[variant.large], setting)
            except Exception as error:  # DALI's, of many types
                failures.append(f"{variant.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
                bench.say(f"  FAILED {failures[-1]}")
    return failures


def verdict(rows: Sequence[Row]) -> str:
    """The whole loader beside what it was, and the fastest pipeline."""
    rates = {row.variant: row.images_per_s or 0.0 for row in rows}
    pipelines = {name: rate for name, rate in rates.items() if name.startswith("pipeline")}
    if not pipelines or "loader" not in rates:
        return "no verdict: too little was measured"
    best = max(pipelines, key=pipelines.__getitem__)
    past = f", before {rates['before, pipeline']:,.0f}" if "before, pipeline" in rates else ""
    return f"loader {rates['loader']:,.0f} img/s{past}; fastest: {best} {pipelines[best]:,.0f}"


def main(argv: Sequence[str] | None = None) -> int:
    top = argparse.ArgumentParser(prog="bench.experiments.dali_variants", description=__doc__.splitlines()[0])
    top.add_argument("--seconds", type=float, default=150, help="begin no new variant after this long")
    top.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    top.add_argument("--variants", default="", help="names, separated by ';' (default: all)")
    top.add_argument("--rehearse", action="store_true", help="on a CPU, tiny")
    top.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    options = top.parse_args(argv)
    if not options.rehearse and not torch.cuda.is_available():
        print("bench.experiments.dali_variants: error: no CUDA device; --rehearse needs none", file=sys.stderr)
        return 2
    names = [name.strip() for name in options.variants.split(";") if name.strip()]
    unknown = [name for name in names if name not in {variant.name for variant in variants()}]
    if unknown:
        print(f"bench.experiments.dali_variants: error: no variant {unknown[0]!r}", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.rehearse else "cuda")
    path = options.results / f"{device_name(device)}.csv"
    keep = (lambda row: None) if options.rehearse else (lambda row: write_rows(path, [row]))
    bench = Bench(device, deadline=time.monotonic() + options.seconds, sink=keep)
    setting = Setting(8, 4, 1, 2, 2) if options.rehearse else Setting(512, 256, 16, 5, options.threads)
    failures = compare(bench, setting, names)
    print(verdict(bench.rows))
    for line in failures:
        print(f"FAILED: {line}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
