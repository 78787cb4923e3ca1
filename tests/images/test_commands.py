"""Folders and tars as users have them, through the whole command line: encoded, or one line and nothing left behind."""

import os
import shutil

import pytest
import torch

from fastasync.cli import main
from fastasync.data.shard_loader import ShardLatents
from fastasync.images import centre_crop, decode

SMALL = ["--representations", "texture", "--size", "32", "--grid", "8", "--backend", "pil", "--device", "cpu",
         "--shard-size", "4", "--batch", "2", "--workers", "1"]  # fmt: skip


def encode(where, out, *more):
    return main(["encode", str(where), "--out", str(out), *SMALL, *map(str, more)])


def refused(capsys, where, out, *says):
    """``encode`` and ``check-images`` end with code 2 and one line with all of ``says``; nothing is written."""
    capsys.readouterr()
    commands = (lambda: encode(where, out), lambda: main(["check-images", str(where), "--list", str(out)]))
    for command in commands:
        assert command() == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "it/s" not in line and line.strip()]
        assert len(lines) == 1, lines
        for text in ("fastasync: error: ", *says):
            assert text in lines[0]
        assert not out.exists()


def stored(folder):
    """What is stored of every image, as pixels uint8 [N, 3, 32, 32]: texture is exact."""
    from fastasync.representations import build

    latents = ShardLatents(folder)
    mean, std = (torch.tensor(v).reshape(1, -1, 1, 1) for v in (latents.statistics.mean, latents.statistics.std))
    z, labels = latents.batch(torch.arange(len(latents)))
    return build("texture", (3, 32, 32), 8).decode(z * std + mean), labels


def test_every_kind_of_image_is_encoded(tmp_path, odd_files, crop_of, encoded):
    """Grey, CMYK, 16 bits, palettes, animations, wrong extensions, one pixel wide, and sizes from 20 to 640."""
    files = {**odd_files, "small.png": encoded(crop_of(1).resize((20, 31)), "PNG")}
    files |= {"column.png": encoded(crop_of(1).resize((1, 40)), "PNG"), "wide ü.jpg": encoded(crop_of(2))}
    folder = tmp_path / "set" / "one class"
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    assert encode(tmp_path / "set", tmp_path / "out") == 0
    assert main(["check-latents", str(tmp_path / "out")]) == 0
    pixels, labels = stored(tmp_path / "out")
    assert labels.tolist() == [0] * len(files)
    for image, name in zip(pixels, sorted(files), strict=True):
        expected = torch.from_numpy(centre_crop(decode(files[name]), 32).copy()).permute(2, 0, 1)
        assert (image.int() - expected.int()).abs().max() <= 1, name


def test_names_loops_and_nested_folders_are_encoded(tree, tmp_path):
    assert encode(tree, tmp_path / "out") == 0
    _, labels = stored(tmp_path / "out")
    assert labels.tolist() == [0] * 6 + [1] * 6


def test_tars_are_encoded(tars, tmp_path):
    assert encode(tars, tmp_path / "out") == 0
    _, labels = stored(tmp_path / "out")
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_what_is_no_set_of_images_is_one_line(tree, tars, tmp_path, capsys):
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    refused(capsys, tmp_path / "nowhere", out, "no such folder")
    refused(capsys, empty, out, "no class folders: put the images")
    (empty / "cat").mkdir()
    refused(capsys, empty, out, "class folder cat: no image in it")
    (empty / "cat" / "up").symlink_to("..")
    refused(capsys, empty, out, "class folder cat: no image in it")
    tar = tars / "set-001.tar"
    whole = tar.read_bytes()
    for length in (0, 700, len(whole) // 2):
        tar.write_bytes(whole[:length])
        refused(capsys, tars, out, "set-001.tar: cut short", f"{length}")
    shutil.rmtree(tars)
    tars.mkdir()
    refused(capsys, tars / "*.tar", out, "no tar")


def test_images_that_all_are_bad(tree, tmp_path, capsys):
    """The first one is named and nothing is left; their list leaves nothing to encode."""
    for path in tree.rglob("*.[jJp]*"):
        path.write_bytes(b"")
    assert encode(tree, tmp_path / "out") == 2
    assert "b two/bild 0 ß日本.JPEG: zero bytes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["check-images", str(tree), "--list", str(tmp_path / "bad.txt")]) == 1
    assert encode(tree, tmp_path / "out", "--skip-bad", tmp_path / "bad.txt") == 2
    assert "no image left" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_that_goes_away_meanwhile(tree, tmp_path, capsys, monkeypatch):
    """Listed when the folder was opened, gone when its turn comes."""
    from fastasync.images import sources

    read, gone = sources.FolderSource._read, tree / "b two" / "deeper" / "z.png"

    def late(self, index):
        if index == 5:
            os.unlink(gone)
        return read(self, index)

    monkeypatch.setattr(sources.FolderSource, "_read", late)
    assert encode(tree, tmp_path / "out") == 2
    assert "b two/deeper/z.png: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [1, 2])
def test_one_class_and_more_ranks_than_images(tree, tmp_path, capsys, kept):
    shutil.rmtree(tree / "b two")
    for path in sorted((tree / "ä one").glob("*.JPEG"))[kept:]:
        path.unlink()
    assert encode(tree, tmp_path / "out", "--world", 3, "--rank", 0) == 2
    assert "world size: 3: more ranks than the 1 shards: use at most 1 ranks" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert encode(tree, tmp_path / "out") == 0
    assert len(ShardLatents(tmp_path / "out")) == kept


def refuses(capsys, arguments, *says):
    """The command ends with code 2 and one line with all of ``says``."""
    assert main([str(word) for word in arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastasync")]
    for text in says:
        assert text in line


def test_what_a_command_lacks_is_named(tmp_path, tree, capsys):
    here, out = ["--size", 32, "--grid", 8], tmp_path / "out"
    command = ["encode", tree, "--out", out, *here]
    refuses(capsys, command, "--representations: (not given): give some of ", "or --prepared FOLDER")
    semantic = [*command, "--representations", "texture,semantic"]
    refuses(capsys, semantic, "representation semantic: no encoder", "use --prepared RUN/prepared, or dino_semantic")
    odd = [*command, "--representations", "texture", "--option", "texture.side=3"]
    refuses(capsys, odd, "representation texture: option: 'side': choose one of channels, denoiser")
    for option in ("channels=8", 'denoiser={"steps": 3}'):
        unfitted = [*command, "--representations", "texture", "--option", f"texture.{option}"]
        says = ("representation texture", "learns from the training images", "use --prepared RUN/prepared")
        refuses(capsys, unfitted, *says)
    semvae = ["train-semvae", "--data", tree, "--out", out]
    for device, says in (("tpu", "use cpu, cuda or cuda:N"), ("meta", "use cpu, cuda"), ("cuda:99", "CUDA device")):
        refuses(capsys, [*command, "--representations", "texture", "--device", device], f"--device: {device}: ", says)
        refuses(capsys, [*semvae, "--device", device], f"--device: {device}: ", says)
    for option, says in (("--warmup=-1", "warmup: -1"), ("--kl-weight=nan", "KL weight: nan")):
        refuses(capsys, [*semvae, "--device", "cpu", option], says, "must be at least 0")
    assert not out.exists()


def test_the_list_is_no_folder(tmp_path, tree, capsys):
    """Said before the images are looked at."""
    refuses(capsys, ["check-images", tree, "--list", tmp_path], f"--list: {tmp_path}: is a folder: give the file")
    assert not list(tmp_path.glob(".*"))
    assert not tmp_path.with_name(f"{tmp_path.name}.state").exists()


def test_bad_files_found_while_encoding(tmp_path, tree, capsys):
    """The folder that was begun with them says what it was begun from."""
    bad, out = tmp_path / "bad.txt", tmp_path / "out"
    (tree / "ä one" / "bild 5 ß日本.JPEG").write_bytes(b"")
    assert encode(tree, out) == 2
    assert (out / "shard-00000.safetensors").exists()
    main(["check-images", str(tree), "--list", str(bad)])
    count = len(bad.read_text().splitlines())
    capsys.readouterr()
    assert encode(tree, out, "--skip-bad", bad) == 2
    line = capsys.readouterr().err
    assert f"12 images, 0 bad ones left out; asked for {12 - count} images, {count} bad ones left out: choose" in line
