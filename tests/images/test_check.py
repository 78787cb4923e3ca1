"""The check for bad files: what it finds, that it continues, and what is done with its list."""

import argparse
import json
import shlex

import pytest

from fastasync.errors import UserError
from fastasync.images import add_parser, check, open_images, open_source, read_bad_list, require_checked
from fastasync.images.check import check_images


@pytest.fixture
def mixed(tmp_path, crop_of, encoded, odd_files):
    """A folder with good, odd and bad files."""
    folder = tmp_path / "set" / "class one"
    folder.mkdir(parents=True)
    good = encoded(crop_of(3))
    files = {
        **odd_files,
        "good ü.jpg": good,
        "cut.jpg": good[: len(good) // 2],
        "cut.png": encoded(crop_of(1), "PNG")[:-2000],
        "empty.jpg": b"",
        "page.jpg": b"<html>404</html>",
        "broken.jpg": good[:700] + bytes([0x55] * 20) + b"\xff\xd0\xff\xc4" + good[730:],
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "thumbs.db").write_bytes(b"x")
    return folder.parent


BAD = {"cut.jpg": "truncated", "cut.png": "truncated", "empty.jpg": "zero bytes", "page.jpg": "not an image"}
NOTES = {
    "alpha.png": ["converted from RGB with alpha (dropped)"],
    "animated.gif": ["several frames (the first is used)"],
    "animated.webp": ["several frames (the first is used)"],
    "cmyk.jpg": ["converted from CMYK"],
    "grey.jpg": ["converted from grey"],
    "grey16.png": ["converted from 16-bit grey (high byte)"],
    "palette.png": ["converted from palette"],
    "png named.jpg": ["wrong extension (PNG in a .jpg file)"],
    "transparent palette.png": ["converted from palette"],
}


def run(arguments):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["check-images", *map(str, arguments)])
    return parsed.handler(parsed)


def test_everything_is_found(mixed, tmp_path, capsys):
    listed = tmp_path / "bad list.txt"
    assert run([mixed, "--list", listed, "--workers", 2]) == 1
    printed = capsys.readouterr().out
    bad = read_bad_list(listed)
    assert list(bad) == [f"class one/{name}" for name in sorted([*BAD, "broken.jpg"])]
    for name, reason in BAD.items():
        assert reason in bad[f"class one/{name}"].lower(), name
    notes: dict[str, list[str]] = {}
    for line in (tmp_path / "bad list.txt.notes").read_text().splitlines():
        path, note = line.split("\t")
        notes.setdefault(path.removeprefix("class one/"), []).append(note)
    assert {name: notes.get(name) for name in NOTES if name != "animated.gif"} == {
        name: note for name, note in NOTES.items() if name != "animated.gif"
    }
    assert NOTES["animated.gif"][0] in notes["animated.gif"]
    assert not notes.keys() & {"good ü.jpg", "progressive.jpg", "padded.jpg", "turned.jpg", *BAD}
    assert "18 images checked, 5 bad" in printed
    assert "converted from palette: " in printed
    assert "thumbs.db" in printed
    assert not (tmp_path / "bad list.txt.state").exists()


def test_the_list_is_what_the_loader_refuses(mixed, tmp_path):
    source = open_source(mixed)
    report = check_images(source, tmp_path / "bad.txt", progress=False)
    bad = {path for path, _ in report.bad}
    for index in range(len(source)):
        single = open_images(
            source.without([path for path in source.paths if path != source.path(index)]), 32, 1, "pil"
        )
        if source.path(index) in bad:
            with pytest.raises(UserError, match="check-images"):
                list(single)
        else:
            assert len(list(single)) == 1


def test_tars_are_checked_too(tars, tmp_path, write_tar, crop_of, encoded):
    write_tar(tars / "set-002.tar", {"x.jpg": encoded(crop_of(3))[:1500], "x.cls": b"1"})
    report = check_images(open_source(tars), tmp_path / "bad.txt", workers=2, progress=False)
    assert [path for path, _ in report.bad] == ["set-002.tar/x.jpg"]
    assert (tmp_path / "bad.txt").read_text().startswith("set-002.tar/x.jpg\t")


def test_files_that_are_no_lists_are_not_written_over(mixed, tmp_path):
    image = mixed / "class one" / "good ü.jpg"
    text = tmp_path / "notes.txt"
    text.write_text("what I must not forget\n")
    (tmp_path / "bad.txt.notes").write_text("mine\n")
    for path, taken in ((image, image), (text, text), (tmp_path / "bad.txt", tmp_path / "bad.txt.notes")):
        before = taken.read_bytes()
        with pytest.raises(UserError, match="is there and is no list of check-images: remove it, or give another"):
            run([mixed, "--list", path])
        assert taken.read_bytes() == before
    assert not (tmp_path / "bad.txt").exists()
    assert not list(tmp_path.rglob("*.state"))
    (tmp_path / "bad.txt.notes").unlink()
    first = check_images(open_source(mixed), tmp_path / "bad.txt", progress=False)
    assert check_images(open_source(mixed), tmp_path / "bad.txt", progress=False) == first, "its own list it may"


def test_the_option_that_is_suggested_can_be_typed(mixed, tmp_path, capsys):
    listed = tmp_path / "bad list.txt"
    run([mixed, "--list", listed])
    option = capsys.readouterr().out.partition("leave these files out with ")[2].rpartition(")")[0]
    assert shlex.split(option) == ["--skip-bad", str(listed)]


def test_a_clean_folder(tree, tmp_path):
    assert run([tree, "--list", tmp_path / "bad.txt"]) == 0
    assert (tmp_path / "bad.txt").read_text() == ""


@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_check_continues(tree, tmp_path, monkeypatch, torn):
    (tree / "b two" / "bild 1 ß日本.JPEG").write_bytes(b"")
    (tree / "ä one" / "bild 3 ß日本.JPEG").write_bytes(b"")
    source = open_source(tree)
    whole = check_images(source, tmp_path / "whole.txt", progress=False)
    monkeypatch.setattr(check, "BLOCK", 4)
    inspect, seen = check.inspect, []

    stop_at = source.path(9)

    def watch(data, path):
        seen.append(path)
        if path == stop_at:
            raise KeyboardInterrupt
        return inspect(data, path)

    monkeypatch.setattr(check, "inspect", watch)
    with pytest.raises(KeyboardInterrupt):
        check_images(source, tmp_path / "bad.txt", workers=1, progress=False)
    assert not (tmp_path / "bad.txt").exists()
    state = tmp_path / "bad.txt.state"
    assert json.loads(state.read_text().splitlines()[-1])["done"] == 8
    if torn:
        state.write_text(state.read_text()[:-9])
    stop_at = ""
    seen.clear()
    report = check_images(source, tmp_path / "bad.txt", workers=1, progress=False)
    assert sorted(seen) == sorted(source.paths[4 if torn else 8 :])
    assert report == whole
    assert (tmp_path / "bad.txt").read_text() == (tmp_path / "whole.txt").read_text()


def test_a_state_of_other_files_is_not_used(tree, tmp_path):
    (tmp_path / "bad.txt.state").write_text('{"fingerprint": "other"}\n{"done": 12, "bad": [[0, "x"]], "notes": []}\n')
    assert check_images(open_source(tree), tmp_path / "bad.txt", progress=False).bad == []


def test_require_checked(mixed, tmp_path):
    source = open_source(mixed)
    listed = tmp_path / "bad.txt"
    check_images(source, listed, progress=False)
    assert require_checked(source, None, skip_bad=False) is source
    with pytest.raises(UserError, match=r"^class one/broken.jpg \(and 4 more\): .*--skip-bad .*bad.txt"):
        require_checked(source, listed, skip_bad=False)
    rest = require_checked(source, listed, skip_bad=True)
    assert (rest.left_out, len(rest)) == (5, len(source) - 5)
    assert len(list(open_images(rest, 16, 1, "pil"))) == len(rest)
    assert require_checked(rest, listed, skip_bad=False) is rest
    listed.write_text("class one/cut.jpg\n\n")  # written by hand
    assert require_checked(source, listed, skip_bad=True).left_out == 1


def test_user_errors(tree, tmp_path):
    with pytest.raises(UserError, match=r"none.txt: No such file.*check-images"):
        read_bad_list(tmp_path / "none.txt")
    with pytest.raises(UserError, match="--workers: 0"):
        run([tree, "--workers", 0])
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="choose a folder that can be written to"):
        run([tree, "--list", tmp_path / "file" / "bad.txt"])
