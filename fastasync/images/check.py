"""``fastasync check-images``: decode every file beforehand, and list those that no loader could use."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from fastasync.errors import UserError
from fastasync.files import atomic_path
from fastasync.images.sources import ImageSource, open_source
from fastasync.images.transforms import BadImage, load_pixels, open_image

BLOCK = 512  # images between two lines of the state file
FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".gif": "GIF", ".bmp": "BMP"}
FORMATS |= {".tif": "TIFF", ".tiff": "TIFF"}
MODES = {
    "1": "black and white",
    "L": "grey",
    "P": "palette",
    "LA": "grey with alpha (dropped)",
    "PA": "palette with alpha (dropped)",
    "RGBA": "RGB with alpha (dropped)",
    "F": "floating-point grey",
}


@dataclass
class CheckReport:
    """Of ``checked`` images: (path, reason) of the ``bad`` ones, and (path, note) of usable ones worth knowing of."""

    checked: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)

    def summary(self) -> str:
        """A few lines: how many of what."""
        lines = [f"{self.checked:,} images checked, {len(self.bad):,} bad"]
        for title, found in (("bad", self.bad), ("usable", self.notes)):
            counts = Counter(reason.partition(" (")[0] for _, reason in found)
            lines += [f"  {title}, {reason}: {count:,}" for reason, count in counts.most_common()]
        return "\n".join(lines)


def inspect(data: bytes, path: str) -> list[str]:
    """Notes on a usable image file: content unlike its extension, frames that are not used, mode that is converted.

    Raises BadImage for a file that cannot be used: zero bytes, not an image, cut short, damaged.
    """
    image = open_image(data)
    notes = []
    content = "JPEG" if image.format == "MPO" else image.format  # several JPEGs in one file, as some cameras write them
    extension = Path(path).suffix.lower()
    if FORMATS.get(extension) != content:
        notes.append(f"wrong extension ({content} in a {extension} file)")
    if getattr(image, "is_animated", False):
        notes.append("several frames (the first is used)")
    if image.mode != "RGB":
        mode = "16-bit grey (high byte)" if image.mode.startswith("I") else MODES.get(image.mode, image.mode)
        notes.append(f"converted from {mode}")
    if content == "JPEG":
        image.draft("RGB", (image.width // 8, image.height // 8))  # reads all the data, but computes fewer pixels
    load_pixels(image)
    return notes


def check_images(
    source: ImageSource, out_list: str | Path, workers: int | None = None, progress: bool = True
) -> CheckReport:
    """Inspect every image; write ``out_list``: a line ``path TAB reason`` for each bad one, in the source's order.

    What was noticed about usable images goes into ``out_list`` + ``.notes``, in the same form.  ``workers`` threads
    (default: one for each CPU).  After an interruption the same call continues; the state is in ``out_list`` +
    ``.state``.  Raises UserError when the files cannot be written, or where one is there that is no such list.
    """
    out_list = Path(out_list)
    if out_list.is_dir():
        raise UserError("--list", out_list, "is a folder: give the file to write")
    for path in (out_list, _notes_of(out_list)):
        if not _is_list(path):
            raise UserError("--list", path, "is there and is no list of check-images: remove it, or give another name")
    state = out_list.with_name(f"{out_list.name}.state")
    lines = _read_state(state, source)
    with atomic_path(state) as partial:
        partial.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    try:
        _inspect_rest(source, state, lines, workers or len(os.sched_getaffinity(0)), progress)
    except OSError as error:
        raise UserError(str(state), error.strerror, "run the same command again once it can be written") from None
    report = CheckReport(checked=len(source))
    for line in lines[1:]:
        report.bad += [(source.path(index), reason) for index, reason in line["bad"]]
        report.notes += [(source.path(index), note) for index, note in line["notes"]]
    for path, found in ((_notes_of(out_list), report.notes), (out_list, report.bad)):
        with atomic_path(path) as partial:
            text = "".join(f"{name}\t{reason}\n" for name, reason in found)
            partial.write_text(text, encoding="utf-8", errors="surrogateescape")
    state.unlink()
    return report


def _notes_of(out_list: Path) -> Path:
    return out_list.with_name(f"{out_list.name}.notes")


def _is_list(path: Path) -> bool:
    """Whether ``path`` may be written over: it is not there, or each line of it is ``path TAB reason``."""
    if not path.exists():
        return True
    try:
        with open(path, "rb") as stream:
            return all(b"\t" in line and b"\0" not in line for line in stream)
    except OSError:
        return False


def _inspect_rest(source: ImageSource, state: Path, lines: list[dict], workers: int, progress: bool) -> None:
    """Inspect what ``lines`` does not cover yet; append a line for each block, there and in the file."""

    def look(index: int) -> tuple[str, list[str]]:
        try:
            return "", inspect(source.read(index), source.path(index))
        except UserError as error:
            return str(error.value), []
        except BadImage as error:
            return str(error), []

    done = lines[-1].get("done", 0)
    bar = tqdm(total=len(source), initial=done, desc="check-images", unit="img", disable=not progress)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="check")
    try:
        with open(state, "a") as stream, bar:
            for start in range(done, len(source), BLOCK):
                block = range(start, min(start + BLOCK, len(source)))
                line: dict = {"done": block.stop, "bad": [], "notes": []}
                for index, (reason, notes) in zip(block, pool.map(look, block)):
                    if reason:
                        line["bad"].append([index, reason])
                    line["notes"] += [[index, note] for note in notes]
                    bar.update()
                lines.append(line)
                stream.write(json.dumps(line) + "\n")
                stream.flush()
    finally:
        pool.shutdown(cancel_futures=True)


def _read_state(state: Path, source: ImageSource) -> list[dict]:
    """The lines of an interrupted check of the same files, up to the first that is not whole; at least the header."""
    header = {"fingerprint": source.fingerprint}
    lines: list[dict] = []
    try:
        for text in state.read_text().splitlines():
            lines.append(json.loads(text))
    except (OSError, ValueError):  # no state, or a last line that was cut short
        pass
    return lines if lines[:1] == [header] else [header]


def read_bad_list(path: str | Path) -> dict[str, str]:
    """``{path: reason}`` of a list that ``check_images`` wrote (a line without a tab is a path).  Raises UserError."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError as error:
        raise UserError(
            str(path), error.strerror, "make the list with `fastasync check-images DIR --list FILE`"
        ) from None
    pairs = (line.rstrip("\r").partition("\t") for line in lines if line.strip())
    return {name: reason or "listed" for name, _, reason in pairs}


def require_checked(source: ImageSource, bad_list: str | Path | None, skip_bad: bool) -> ImageSource:
    """The source without the files of ``bad_list`` (counted in ``left_out``) if ``skip_bad``; else UserError if any.

    Bad files that are in no list are refused by the loaders, by name, when their turn comes.
    """
    if bad_list is None:
        return source
    listed = read_bad_list(bad_list)
    present = [path for path in source.paths if path in listed]
    if not present:
        return source
    if skip_bad:
        return source.without(present)
    more = f" (and {len(present) - 1} more)" if len(present) > 1 else ""
    raise UserError(f"{present[0]}{more}", listed[present[0]], f"repair it, or leave it out with --skip-bad {bad_list}")


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add ``check-images`` to the command line's subparsers; its namespace has ``handler`` = check_images_command."""
    text = "decode every image of a folder (or of WebDataset tars) and list the files that cannot be used"
    parser = commands.add_parser("check-images", help=text, description=text)
    parser.add_argument("where", metavar="DIR", help="folder of class folders, folder of tars, or a glob of tars")
    parser.add_argument("--list", type=Path, default=Path("bad.txt"), help="the list to write (default %(default)s)")
    parser.add_argument("--workers", type=int, help="threads (default: one for each CPU)")
    parser.set_defaults(handler=check_images_command)
    return parser


def check_images_command(arguments: argparse.Namespace) -> int:
    """Run ``check-images``: print the summary; 0 when every file can be used, else 1.  Raises UserError."""
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError("--workers", arguments.workers, "must be at least 1")
    source = open_source(arguments.where)
    report = check_images(source, arguments.list, arguments.workers)
    print(report.summary())
    if source.ignored:
        print(f"  not looked at, no image's extension: {len(source.ignored):,} ({source.ignored[0]}, ...)")
    if report.notes:
        print(f"notes: {arguments.list}.notes")
    if report.bad:
        print(f"list: {arguments.list} (leave these files out with --skip-bad {shlex.quote(str(arguments.list))})")
    return 1 if report.bad else 0
