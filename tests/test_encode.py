"""Images become shards: exactly, resumably, by any number of ranks; bad input is one line before long work."""

import argparse
import os
import signal
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastasync import encode as encode_module
from fastasync.config import Config, apply_settings
from fastasync.data import ImageSet
from fastasync.data.shard_loader import ShardLatents, open_latents
from fastasync.data.shards import check_latents, read_index, write_shard
from fastasync.encode import add_parser, encode
from fastasync.errors import UserError
from fastasync.images import open_images, open_source
from fastasync.inputs import check_decoder
from fastasync.representations import (
    Bundle,
    ClassifierSettings,
    Recipe,
    Representation,
    build,
    load_plugin,
    load_prepared,
    prepare,
    with_statistics,
)
from fastasync.representations.weights import import_model_package

COUNT = 26
PLUGIN = '''
import torch
from fastasync.representations import Representation, register

@register("brightness")
class Brightness(Representation):
    """A third representation: mean and slope of the grey value of each token."""

    def __init__(self, image_shape, grid, power: float = 1.0):
        super().__init__(image_shape, grid)
        self.channels, self.power = 2, power

    def encode(self, images):
        grey = torch.nn.functional.adaptive_avg_pool2d(images.float().mean(1, keepdim=True) / 255, self.grid)
        return torch.cat([grey ** self.power, grey - grey.roll(1, 3)], dim=1)
'''


@pytest.fixture
def images() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (COUNT, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(COUNT) % 4, 4, ("a", "b", "c", "d"), "noise", mirror=True)


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    """K = 3."""
    plugin = tmp_path / "brightness.py"
    plugin.write_text(PLUGIN)
    load_plugin(plugin)
    return Bundle([build(name, (3, 8, 8), 4) for name in ("texture", "lowfreq", "brightness")])


class Features:
    """Frozen features of 16 tokens of width 5."""

    shape = (16, 5)

    def fingerprint(self) -> str:
        return "features-1"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :80].float().reshape(-1, 16, 5) / 255


def make(images, bundle, out, **options):
    return encode(images, bundle, out, **dict(shard_size=5, batch=2, progress=False) | options)


def contents(folder: Path) -> dict[str, bytes]:
    kept = (path for path in sorted(folder.iterdir()) if path.name != ".lock")
    return {path.name: b"" if path.is_dir() else path.read_bytes() for path in kept}


def test_latents_are_the_bundles(tmp_path, images, bundle):
    report = make(images, bundle, tmp_path / "out", features=Features())
    assert report[:4] == (6, 0, 0, 0)
    assert check_latents(tmp_path / "out", progress=False).problems == []
    expected = with_statistics(bundle, iter(bundle.encode(images.images).split(9)))
    latents = ShardLatents(tmp_path / "out", bundle=bundle, features=True)
    assert torch.tensor(latents.statistics.mean).sub(torch.tensor(expected.statistics.mean)).abs().max() < 1e-12
    assert latents.statistics.representations == expected.statistics.representations
    ours, every = Bundle(bundle.representations, latents.statistics), torch.arange(COUNT)
    z, y = latents.batch(every)
    assert torch.equal(z, ours.normalise(bundle.encode(images.images)))
    assert torch.equal(y, images.labels)
    assert latents.classes == 4
    mirrored = images.images.flip(-1)
    flips = torch.ones(COUNT, dtype=torch.bool)
    assert torch.equal(latents.batch(every, flips)[0], ours.normalise(bundle.encode(mirrored)))
    assert torch.equal(latents.features(every, flips), Features()(mirrored).half())


def test_what_it_waited_for(tree, tmp_path, bundle, monkeypatch):
    def slow(*arguments, **options):
        for batch in open_images(*arguments, **options):
            time.sleep(0.1)
            yield batch

    def slow_disk(*arguments):
        time.sleep(0.3)
        write_shard(*arguments)

    bundle = Bundle(bundle.representations[:2])
    source = open_source(tree)
    monkeypatch.setattr(encode_module, "open_images", slow)
    options = {"shard_size": len(source), "batch": 2, "backend": "pil"}
    report = make(source, bundle, tmp_path / "slow images", **options)
    later = -(-len(source) // 2) - 1  # the first batch's wait is the start, and not counted
    assert 0.1 * later <= report.waited
    assert report.waited <= report.seconds
    monkeypatch.setattr(encode_module, "open_images", open_images)
    monkeypatch.setattr(encode_module, "write_shard", slow_disk)
    report = make(source, bundle, tmp_path / "slow disk", **options)
    assert 0.3 <= report.wrote <= report.seconds
    assert report.waited < report.wrote
    assert make(source, bundle, tmp_path / "slow disk", **options) == (0, 1, 0, 0, 0.0, 0.0, 0.0)


def test_any_number_of_ranks_makes_the_same_folder(tmp_path, images, bundle):
    make(images, bundle, tmp_path / "one")
    expected = contents(tmp_path / "one")
    for rank, missing in ((2, 4), (0, 2), (1, 0)):  # the last to finish writes the index
        assert make(images, bundle, tmp_path / "three", rank=rank, world=3)[:4] == (2, 0, missing, 0)
        assert ("index.json" in contents(tmp_path / "three")) == (missing == 0)
    assert contents(tmp_path / "three") == expected
    assert make(images, bundle, tmp_path / "three")[:4] == (0, 6, 0, 0)


EVENTS = ("encode", "fsync", "replace")


def killed(event: str, count: int, work) -> int:
    """Run ``work`` in a forked child that kills itself (SIGKILL) at the ``count``-th ``event``; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            left = [count]

            def counted(function):
                def call(*arguments, **options):
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*arguments, **options)

                return call

            if event == "encode":
                Bundle.encode = counted(Bundle.encode)
            else:
                setattr(os, event, counted(getattr(os, event)))
            work()
        finally:
            os._exit(7)  # not killed: more events were asked for than there are
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("event", EVENTS)
def test_kill_minus_nine_anywhere(tmp_path, images, bundle, event):
    """After any kill no finished shard is made again, nothing half-written stays, and the result is bit for bit."""
    make(images, bundle, tmp_path / "whole", features=Features())
    expected = contents(tmp_path / "whole")
    out, kills = tmp_path / "out", 0
    for count in (0, 1, 2, 3, 5, 4, 6, 3, 2, 7):
        status = killed(event, count, lambda: make(images, bundle, out, features=Features()))
        if not os.WIFSIGNALED(status):
            break
        kills += 1
        assert os.WTERMSIG(status) == signal.SIGKILL
        for name, data in contents(out).items():  # whatever has its final name is whole
            assert name.endswith(".partial") or data == expected[name], name
    assert kills >= 3
    finished = {path.name: path.stat().st_ino for path in out.glob("shard-*.safetensors")}
    report = make(images, bundle, out, features=Features())
    assert report.made + report.kept == 6
    assert report.kept == len(finished)
    assert contents(out) == expected
    assert all((out / name).stat().st_ino == inode for name, inode in finished.items())


def test_a_removed_shard_alone_is_made_again(tmp_path, images, bundle):
    make(images, bundle, tmp_path / "out")
    expected = contents(tmp_path / "out")
    (tmp_path / "out" / "shard-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard-00003.safetensors: missing: run the same"):
        ShardLatents(tmp_path / "out")
    assert make(images, bundle, tmp_path / "out")[:4] == (1, 5, 0, 0)
    assert contents(tmp_path / "out") == expected


def test_leftovers_of_other_ranks_stay(tmp_path, images, bundle):
    make(images, bundle, tmp_path / "out", rank=0, world=2)
    for shard in (1, 3):
        (tmp_path / "out" / f".shard-0000{shard}.safetensors.77.partial").write_text("being written by rank 1")
    (tmp_path / "out" / "shard-00000.safetensors").unlink()
    (tmp_path / "out" / ".shard-00000.safetensors.78.partial").write_text("left by a killed rank 0")
    make(images, bundle, tmp_path / "out", rank=0, world=2)
    left = sorted(path.name for path in (tmp_path / "out").glob(".*.partial"))
    assert left == [f".shard-0000{shard}.safetensors.77.partial" for shard in (1, 3)]
    make(images, bundle, tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*.partial"))


def test_two_processes_never_make_the_same_shard(tmp_path, images, bundle):
    """What happens when a launcher gives every process rank 0: the second one says so."""
    out, (ready, go) = tmp_path / "out", (os.pipe(), os.pipe())
    child = os.fork()
    if child == 0:
        encode_batch = Bundle.encode

        def wait(self, pixels):
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            Bundle.encode = encode_batch
            return encode_batch(self, pixels)

        Bundle.encode = wait
        make(images, bundle, out, rank=1, world=2)
        os._exit(0)
    os.read(ready[0], 1)
    for options in (dict(rank=1, world=2), dict()):
        with pytest.raises(UserError, match="another process is encoding shard 1 here: wait for it, or give each"):
            make(images, bundle, out, **options)
    assert make(images, bundle, out, rank=0, world=2)[:4] == (3, 0, 3, 0)
    os.write(go[1], b"x")
    assert os.waitpid(child, 0)[1] == 0
    assert make(images, bundle, out)[:4] == (0, 6, 0, 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_without_mirrored_images(tmp_path, images, bundle, dtype):
    make(images, bundle, tmp_path / "out", dtype=dtype, flip=False)
    latents = ShardLatents(tmp_path / "out")
    raw = bundle.encode(images.images).to(getattr(torch, dtype)).float()
    assert torch.equal(
        latents.batch(torch.arange(COUNT))[0], Bundle(bundle.representations, latents.statistics).normalise(raw)
    )


# --- bad input --------------------------------------------------------------------------------------------------------


def test_arguments_are_refused_before_any_work(tmp_path, images, bundle, monkeypatch):
    monkeypatch.setattr(Bundle, "encode", None)
    for options, message in (
        (
            dict(world=7),
            r"world size: 7: more ranks than the 6 shards: use at most 6 ranks, or --shard-size of at most 3",
        ),
        (dict(world=40), r"world size: 40: more ranks than the 6 shards: use at most 6 ranks$"),
        (dict(rank=2, world=2), r"rank: 2: must be in 0..1"),
        (dict(world=0), r"world size: 0: must be at least 1"),
        (dict(dtype="float61"), r"--dtype: 'float61': did you mean 'float16'"),
        (dict(shard_size=0), r"--shard-size: 0: must be at least 1"),
        (dict(batch=0), r"--batch: 0: must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            make(images, bundle, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    other = Bundle([build("texture", (3, 16, 16), 4)])
    with pytest.raises(UserError, match="representations: image shape: 3x16x16: the images are 3x8x8"):
        make(images, other, tmp_path / "out")
    usage = namedtuple("usage", "total used free")(10**6, 0, 1000)
    monkeypatch.setattr(encode_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"8.*e-05 GB to write, 1e-06 GB free: free some, .*--dtype float16"):
        make(images, bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_encoder_images_or_dtype_in_the_same_folder(tmp_path, images, bundle):
    make(images, bundle, tmp_path / "out")
    expected = contents(tmp_path / "out")
    changed = [
        build("texture", (3, 8, 8), 4),
        build("lowfreq", (3, 8, 8), 4),
        build("brightness", (3, 8, 8), 4, power=2),
    ]
    relabelled = ImageSet(images.images, images.labels.flip(0), 4, images.class_names, "noise")
    for source, representations, options, message in (
        (images, Bundle(changed), {}, "encoded with fingerprints"),
        (relabelled, bundle, {}, "begun from 26 images, 0 bad ones left out; asked for others"),
        (
            images,
            bundle,
            dict(dtype="bfloat16"),
            "encoded with dtype float32, asked for bfloat16: choose another folder",
        ),
        (images, bundle, dict(flip=False), "encoded with flip true, asked for false"),
        (images, bundle, dict(features=Features()), "encoded with features none, asked for features-1"),
    ):
        with pytest.raises(UserError, match=message):
            make(source, representations, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == expected
    with pytest.raises(UserError, match="made by another brightness encoder"):
        ShardLatents(tmp_path / "out", bundle=Bundle(changed))


def test_a_refused_call_leaves_nothing(tmp_path, images, bundle):
    """Bad input that only the first images show: no folder, no parent of it; what was there before stays."""
    pixels = images.images.clone()
    pixels[0, 0, 0, 0] = 7
    source = ImageSet(pixels, images.labels, 4, images.class_names, "noise")
    broken = Bundle([build("texture", (3, 8, 8), 4), Broken((3, 8, 8), 4)])
    for options in (dict(), dict(world=2)):
        with pytest.raises(UserError, match="not finite"):
            make(source, broken, tmp_path / "new" / "deep" / "out", **options)
        assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="not finite"):
        make(source, broken, tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds thesis.tex"):
        make(images, bundle, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    make(images, bundle, tmp_path / "out", rank=1, world=2)
    begun = contents(tmp_path / "out")
    with pytest.raises(UserError, match="begun from"):
        make(source, broken, tmp_path / "out")
    assert contents(tmp_path / "out") == begun


def test_a_refused_rank_does_not_take_the_folder_from_another(tmp_path, images, bundle):
    """Rank 1 began it, rank 0 joins, rank 1 fails; rank 0 ends, and rank 1 can come again."""
    out, (ready, go) = tmp_path / "out", (os.pipe(), os.pipe())
    encode_batch = Bundle.encode

    def wait(self, pixels):
        Bundle.encode = encode_batch
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        return encode_batch(self, pixels)

    class Unwilling(Bundle):
        def encode(self, pixels):
            children.append(os.fork())
            if not children[0]:
                Bundle.encode = wait
                make(images, bundle, out, rank=0, world=2)
                os._exit(0)
            os.read(ready[0], 1)
            raise UserError("images", None, "not understood")

    children: list[int] = []
    with pytest.raises(UserError, match="not understood"):
        make(images, Unwilling(bundle.representations), out, rank=1, world=2)
    os.write(go[1], b"x")
    assert os.waitpid(children[0], 0)[1] == 0
    assert make(images, bundle, out, rank=1, world=2)[:4] == (3, 0, 0, 0)


class Broken(Representation):
    """NaN for the images whose first pixel is 7."""

    name, channels, options = "broken", 1, {}

    def encode(self, images):
        pooled = images[:, :1, ::2, ::2].float()
        return pooled.masked_fill((images[:, :1, :1, :1] == 7), float("nan"))


def test_nan_latents_stop_with_the_image(tmp_path, images):
    pixels = images.images.clone()
    pixels[:, 0, 0, 0] = 8
    pixels[13, 0, 0, 0] = 7
    source = ImageSet(pixels, images.labels, 4, images.class_names, "noise")
    bundle = Bundle([build("texture", (3, 8, 8), 4), Broken((3, 8, 8), 4)])
    with pytest.raises(UserError, match=r"latents.broken of image 13: not finite in torch.float32: the encoder gives"):
        make(source, bundle, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("shard-*.safetensors"))) == 2  # those before it


# --- image files and the command line ---------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path) -> Path:
    """Seven images in two class folders."""
    generator = np.random.default_rng(0)
    for number in range(7):
        folder = tmp_path / "images" / ("cat" if number < 3 else "d o g")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def command(monkeypatch):
    """Parse and run a command line of this module."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())

    def run(*words) -> int:
        arguments = parser.parse_args([str(word) for word in words])
        return arguments.handler(arguments)

    return run


SMALL = (
    "--size",
    8,
    "--grid",
    4,
    "--shard-size",
    2,
    "--batch",
    2,
    "--backend",
    "pil",
    "--device",
    "cpu",
    "--workers",
    1,
)


def test_weights_without_the_name_of_their_network(tree, tmp_path, command):
    with pytest.raises(UserError, match=r"--repa-weights: vit.pth: needs --repa-vit"):
        command("encode", tree, "--out", tmp_path / "out", *SMALL, "--repa-weights", "vit.pth")
    assert not (tmp_path / "out").exists()


def test_from_image_files_on_the_command_line(tree, tmp_path, command, capsys, monkeypatch):
    out = tmp_path / "out"
    names = ("--representations", "texture,lowfreq", "--option", "lowfreq.size=4")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command("encode", tree, "--out", out, *SMALL, *names) == 0
    assert "2 shards made, 0 kept; 2 are for other ranks" in capsys.readouterr().out
    assert command("encode", tree, "--out", out, *SMALL, *names, "--rank", 0) == 0
    said = capsys.readouterr().out
    assert "2 shards made, 0 kept; all finished" in said
    assert "after the first batch, of which it waited" in said
    assert command("check-latents", out) == 0
    assert "7 images in 4 shards" in capsys.readouterr().out
    encoding = read_index(out).encoding
    assert encoding.class_names == ("cat", "d o g")
    assert encoding.images == open_source(tree).fingerprint
    bundle = Bundle([build("texture", (3, 8, 8), 4), build("lowfreq", (3, 8, 8), 4, size=4)])
    latents = ShardLatents(out, bundle=bundle)
    assert latents.batch(torch.arange(7))[1].tolist() == [0, 0, 0, 1, 1, 1, 1]
    texture = bundle.representations[0]
    statistics = latents.statistics
    raw = latents.batch(torch.tensor([4]))[0] * torch.tensor(statistics.std).reshape(1, -1, 1, 1)
    decoded = texture.decode((raw + torch.tensor(statistics.mean).reshape(1, -1, 1, 1))[:, :12] + 1e-3)
    from fastasync.images import centre_crop

    with Image.open(tree / "d o g" / "4.png") as image:
        pixels = torch.from_numpy(np.array(centre_crop(image, 8))).permute(2, 0, 1)
    assert torch.equal(decoded[0], pixels)

    path = out / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert command("check-latents", out) == 1
    assert "shard-00001.safetensors: altered" in capsys.readouterr().out


def test_the_representations_of_a_prepared_folder(tree, tmp_path, command, images, capsys):
    """--prepared: its trained encoders, its crop and its grid, whatever --size and --grid say."""
    semvae = {"channels": 3, "semvae": {"width": 16, "heads": 2, "steps": 4, "batch": 8}}
    options = {"semantic": semvae, "texture": {"channels": 5, "denoiser": {"steps": 2, "batch": 4, "width": 16}}}
    recipe = Recipe(2, ClassifierSettings(widths=(8, 16, 16), steps=4, batch=8), options)
    plugin = tmp_path / "brightness.py"
    plugin.write_text(PLUGIN)
    names = ("texture", "semantic", "brightness")
    prepare(images, tmp_path / "prepared", names, test_set=images, recipe=recipe, plugins=[plugin], progress=False)
    out, ours = tmp_path / "out", ("--prepared", tmp_path / "prepared")
    vit = ("--repa-vit", "test_vit", "--repa-weights", tmp_path / "vit.pth")
    torch.save(import_model_package("timm").create_model("test_vit", num_classes=0).state_dict(), vit[-1])
    assert command("encode", tree, "--out", out, *SMALL, *ours, *vit, "--size", 256, "--grid", 16) == 0
    assert command("check-latents", out) == 0
    encoding, prepared = read_index(out).encoding, load_prepared(tmp_path / "prepared").bundle
    assert (encoding.names, encoding.grid, encoding.image_shape) == (names, 2, (3, 8, 8))
    assert encoding.features_shape == (4, 64)
    latents = ShardLatents(out, bundle=prepared, features=True)  # refuses those of other encoders
    (batch,) = open_images(open_source(tree), 8, 7, "pil")
    ours_now = Bundle(prepared.representations, latents.statistics)
    for flips, pixels in ((None, batch.images), (torch.ones(7, dtype=torch.bool), batch.flipped)):
        z, _ = latents.batch(torch.arange(7), flips)
        torch.testing.assert_close(z, ours_now.normalise(prepared.encode(pixels)), rtol=1e-5, atol=1e-5)
    # the folder decodes too; pixels do not
    config = apply_settings(Config(), [f"representations.decoder={tmp_path / 'prepared'}"])
    with open_latents(out, classes=2) as opened:
        check_decoder(config, opened)
        with pytest.raises(UserError, match=r"decoder: texture: is [0-9a-f]{12}, the latents were made by"):
            check_decoder(apply_settings(config, ["representations.decoder=texture", "representations.grid=2"]), opened)
    capsys.readouterr()
    with pytest.raises(UserError, match=r"none: no prepared.json in it: not a prepared folder"):
        command("encode", tree, "--out", tmp_path / "other", *SMALL, "--prepared", tmp_path / "none")
    assert not (tmp_path / "other").exists()


def test_bad_images_are_named_or_left_out(tree, tmp_path, command, capsys):
    bad = tree / "d o g" / "5.png"
    bad.write_bytes(bad.read_bytes()[:60])
    names = ("--representations", "texture")
    with pytest.raises(UserError, match=r"d o g/5.png: .*check-images"):
        command("encode", tree, "--out", tmp_path / "out", *SMALL, *names)
    kept = len(list((tmp_path / "out").glob("shard-*.safetensors")))
    assert kept == 2
    (tmp_path / "bad.txt").write_text("d o g/5.png\ttruncated\n")
    with pytest.raises(UserError, match=r"d o g/5.png: truncated: repair it, or leave it out with --skip-bad"):
        command("encode", tree, "--out", tmp_path / "out", *SMALL, *names, "--bad", tmp_path / "bad.txt")
    out = tmp_path / "without"
    assert command("encode", tree, "--out", out, *SMALL, *names, "--skip-bad", tmp_path / "bad.txt") == 0
    assert "1 bad files left out" in capsys.readouterr().out
    assert (read_index(out).encoding.left_out, read_index(out).encoding.count) == (1, 6)


def test_options_that_are_not_understood(tree, tmp_path, command):
    names = ("--representations", "texture,lowfreq")
    for words, message in (
        (("--option", "lowfreq"), "--option: lowfreq: must be NAME.KEY=VALUE"),
        (("--option", "lowfrq.size=2"), "'lowfrq': did you mean 'lowfreq'"),
        (("--option", "lowfreq.sise=2"), "'sise': did you mean 'size'"),
        (("--backend", "dalli"), "image loader: 'dalli': did you mean 'dali'"),
        (("--workers", "0"), "workers: 0: must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            command("encode", tree, "--out", tmp_path / "out", *SMALL, *names, *words)
        assert not (tmp_path / "out").exists(), words
