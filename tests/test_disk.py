"""The whole command line on folders that cannot be read or written, full disks and damaged files: one line, exit code
2, and nothing lost or half-written."""

import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fastasync import stages
from fastasync.cli import main
from fastasync.data import verify
from fastasync.data.shard_loader import ShardLatents
from fastasync.model import LightningDiT
from fastasync.probe import network
from fastasync.representations.bundle import Bundle
from fastasync.representations.semvae import SemVAE
from fastasync.training import checkpoint

ROOT = Path(__file__).parents[1]
NOBODY = 65534
ENCODE = ["--representations", "texture,lowfreq", "--size", "32", "--grid", "8", "--backend", "pil", "--device", "cpu",
          "--shard-size", "8", "--batch", "8", "--workers", "1"]  # fmt: skip
TRAIN = [
    "data.dataset=latents", "representations.names=texture,lowfreq", "representations.channels=48,3",
    "representations.grid=8", "schedule.name=offset:0.3", "schedule.baselines=", "model.depth=1", "model.width=32",
    "model.heads=2", "model.classes=2", "train.batch=8", "train.steps=4", "train.checkpoint_every=2",
    "train.log_every=1", "train.device=cpu", "data.flip=false",
]  # fmt: skip
SEMVAE = ["--device", "cpu", "--grid", "2", "--steps", "4", "--batch", "8", "--width", "8", "--depth", "1", "--heads",
          "2", "--channels", "2", "--held-out", "4"]  # fmt: skip


@pytest.fixture
def place():
    """A folder that other users may enter, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="fastasync-test-"))
    folder.chmod(0o755)
    yield folder
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.fixture
def images(place, noise_images):
    return noise_images(place / "images")


@pytest.fixture
def latents(place, images):
    assert main(["encode", str(images), "--out", str(place / "latents"), *ENCODE]) == 0
    return place / "latents"


@contextmanager
def without_rights():
    """As a user who may write nothing of ours (root may read and write everything)."""
    if os.geteuid():
        yield
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def train(latents, out, *more, stage="train"):
    settings = [part for setting in (*TRAIN, f"data.root={latents}", *more) for part in ("--set", setting)]
    return [stage, "--preset", "digits", "--out", str(out), *settings]


def refused(capsys, arguments, *says):
    """Exit code 2, one line that says all of ``says``."""
    capsys.readouterr()
    assert main([str(part) for part in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastasync: ")]
    assert len(lines) == 1, lines
    for text in ("fastasync: error: ", *says):
        assert text in lines[0], lines
    return lines[0]


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- rights ---------------------------------------------------------------------------------------------------------


def test_folders_that_cannot_be_written(place, images, latents, capsys):
    """Every command that writes; root's own folder is read-only to who runs it."""
    locked = place / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    assert main(train(latents, place / "run")) == 0
    before = contents(place)
    features = ["train-semvae", "--features", place / "features", *SEMVAE]
    make_features(place / "features")
    with without_rights():
        for out in (locked / "out", place / "run"):
            refused(capsys, train(latents, out, "train.steps=6"), str(out), "Permission denied")
        refused(capsys, ["encode", images, "--out", locked / "out", *ENCODE], "locked/out", "Permission denied")
        refused(capsys, ["encode", images, "--out", latents, *ENCODE], str(latents), "Permission denied")
        refused(capsys, ["check-images", images, "--list", locked / "bad.txt"], "bad.txt", "Permission denied")
        refused(capsys, [*features, "--out", locked / "semvae"], "locked/semvae", "Permission denied")
        refused(capsys, ["convert", place / "run", locked / "a.pt"], "locked/a.pt", "Permission denied")
        decoder = ["--set", "representations.decoder=texture"]
        refused(capsys, ["sample", "--out", place / "run", *decoder], str(place / "run"), "Permission denied")
        refused(capsys, ["report", "--out", place / "run"], str(place / "run"), "Permission denied")
    shutil.rmtree(place / "features")
    assert contents(place) == before
    assert list(locked.iterdir()) == []


def test_folders_that_cannot_be_made(images, latents, place, capsys):
    """Under /proc no folder can be: the system says so with a number that no list of ours would hold."""
    assert main(train(latents, place / "run")) == 0
    nowhere = Path("/proc/nope")
    for command in (
        train(latents, nowhere / "out"),
        ["encode", images, "--out", nowhere / "out", *ENCODE],
        ["check-images", images, "--list", nowhere / "bad.txt"],
        ["convert", place / "run", nowhere / "a.pt"],
    ):
        refused(capsys, command, str(nowhere), "No such file or directory")


def make_features(folder):
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {"feats_dino": torch.randn(40, 6, 2, 2), "labels": torch.arange(40) % 2}
    save_file(tensors, folder / "a.safetensors")
    (folder / "a.safetensors").chmod(0o644)


def test_folders_and_files_that_cannot_be_read(place, images, latents, capsys):
    """What is not ours to read is named by every command that would."""
    assert main(train(latents, place / "run")) == 0
    mine = place / "mine"
    mine.mkdir()
    mine.chmod(0o777)
    (images / "class 1").chmod(0o000)
    (images / "class 0" / "4.png").chmod(0o000)
    (latents / "shard-00001.safetensors").chmod(0o000)
    (place / "run" / "config.yaml").chmod(0o000)
    with without_rights():
        encode = ["encode", "--out", mine / "out", *ENCODE]
        refused(capsys, [*encode, images], "class 1", "Permission denied")
        refused(capsys, train(latents, mine / "out"), "shard-00001.safetensors", "Permission denied")
        refused(capsys, ["train", "--out", place / "run"], "config.yaml", "Permission denied")
    (images / "class 1").chmod(0o755)
    latents.chmod(0o000)
    (place / "run" / "config.yaml").chmod(0o644)
    (place / "run" / "checkpoints").chmod(0o000)
    with without_rights():
        refused(capsys, [*encode, images], "class 0/4.png", "Permission denied")
        refused(capsys, train(latents, mine / "out"), str(latents), "Permission denied")
        refused(capsys, ["check-latents", latents], str(latents), "Permission denied")
        refused(capsys, ["verify", place / "run"], "checkpoints", "Permission denied")
        refused(capsys, ["convert", place / "run", mine / "a.pt"], "checkpoints", "Permission denied")
    assert list(mine.iterdir()) == []
    latents.chmod(0o755)
    images.chmod(0o000)
    with without_rights():
        refused(capsys, [*encode, images], str(images), "Permission denied")
        refused(capsys, ["check-images", images, "--list", mine / "bad.txt"], str(images), "Permission denied")
    assert list(mine.iterdir()) == []


# --- a full disk ----------------------------------------------------------------------------------------------------


def limited(size, *arguments):
    """The command in a process whose files cannot grow beyond ``size`` bytes: a full disk, to who cannot mount one."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "without")])
    return subprocess.run(
        [sys.executable, "-m", "fastasync", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": paths}, timeout=120, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )  # fmt: skip


def said(done, *says):
    lines = [line for line in done.stderr.splitlines() if line.startswith("fastasync: ")]
    assert (done.returncode, len(lines)) == (2, 1), done.stderr
    for text in ("fastasync: error: ", *says):
        assert text in lines[0]
    assert "Traceback" not in done.stderr


def test_a_disk_that_is_full_while_encoding(place, images):
    """Shards are 260 kB: nothing is left of the first; with room for them the same command ends well."""
    done = limited(100_000, "encode", images, "--out", place / "out", *ENCODE)
    said(done, "shard-00000.safetensors")
    assert not (place / "out").exists()
    assert main(["encode", str(images), "--out", str(place / "out"), *ENCODE]) == 0


def test_a_disk_that_is_full_while_training(place, latents):
    """No room for the first checkpoint; then for the third one; the same command goes on from what is good."""
    out = place / "run"
    done = limited(100_000, *train(latents, out))
    said(done, "checkpoints/step_00000002.part", "there is no earlier checkpoint")
    assert list((out / "checkpoints").iterdir()) == []
    assert main(train(latents, out)) == 0
    done = limited(100_000, *train(latents, out, "train.steps=6"))
    good = out / "checkpoints" / "step_00000004"
    said(done, f"the last good checkpoint is {good}")
    assert checkpoint.newest(out / "checkpoints") == (good, [])
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]
    assert main(train(latents, out, "train.steps=6")) == 0
    said(limited(100_000, "convert", out, place / "published.pt"), "published.pt")
    assert not list(place.glob("*published*"))


def test_a_disk_that_is_full_before_anything_is_there(place, latents, images):
    """Not even the configuration, the list or the lock fits."""
    for arguments in (
        train(latents, place / "run"),
        ["encode", images, "--out", place / "out", *ENCODE],
        ["check-images", images, "--list", place / "bad.txt"],
    ):
        done = limited(10, *arguments)
        said(done)
    assert sorted(path.name for path in place.iterdir() if path.is_file()) == []
    assert not (place / "out").exists()


# --- damage ---------------------------------------------------------------------------------------------------------


def flip(path, position=-20):
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def test_damaged_latents_are_named_before_training(latents, tmp_path, capsys):
    out = tmp_path / "run"
    index, shard = latents / "index.json", latents / "shard-00001.safetensors"
    good = {path: path.read_bytes() for path in (index, shard)}
    flip(index)
    refused(capsys, train(latents, out), "index.json: ", "delete it and run the same `fastasync encode` again")
    index.write_bytes(good[index])
    flip(shard, 20)
    refused(capsys, train(latents, out), "shard-00001.safetensors")
    flip(shard, 20)
    shard.write_bytes(good[shard][:-5])
    refused(capsys, train(latents, out), "shard-00001.safetensors", "cut short")
    shard.unlink()
    refused(capsys, train(latents, out), "shard-00001.safetensors: missing: run the same `fastasync encode` again")
    index.unlink()
    refused(capsys, train(latents, out), "encoding has not finished: run `fastasync encode` (again)")
    assert not out.exists()


def test_what_is_no_folder_of_latents(place, images, tmp_path, capsys):
    empty, text, out = place / "empty", place / "text", tmp_path / "run"
    empty.mkdir()
    text.mkdir()
    (text / "notes.txt").write_text("")
    for folder, says in (
        (images, f"holds images, not encoded latents: run `fastasync encode {images} --out LATENTS` and give LATENTS"),
        (images / "class 0", "holds images, not encoded latents: run `fastasync encode "),
        (empty, f"is empty, not encoded latents: run `fastasync encode IMAGES --out {empty}` first"),
        (text, "holds no index.json, not encoded latents: give the --out of `fastasync encode` as data.root"),
        (place / "none", "no such folder"),
    ):
        refused(capsys, train(folder, out), f"{folder}: {says}")
        refused(capsys, ["check-latents", folder], f"{folder}: {says}")
    assert not out.exists()


@pytest.fixture
def three(place, images):
    """Latents in three shards."""
    assert main(["encode", str(images), "--out", str(place / "three"), *ENCODE, "--shard-size", "4"]) == 0
    assert len(list((place / "three").glob("*.safetensors"))) == 3
    return place / "three"


def test_a_flipped_bit_in_the_numbers_of_a_shard(three, tmp_path, capsys):
    """Only its hash tells: training, resuming and the probe look at it before any step."""
    out, shard = tmp_path / "run", three / "shard-00001.safetensors"
    assert main(train(three, out)) == 0
    before = contents(out / "checkpoints")
    flip(shard)
    assert main(["check-latents", str(three)]) == 1
    assert "shard-00001.safetensors: altered" in capsys.readouterr().out
    says = (f"{shard}: altered (hash ", "delete it and run the same `fastasync encode` again")
    refused(capsys, train(three, out, "train.steps=6"), *says)  # resumed
    assert contents(out / "checkpoints") == before
    refused(capsys, train(three, tmp_path / "new"), *says)
    assert not (tmp_path / "new" / "checkpoints").exists()
    probe = ["schedule.name=learned", "probe.estimator=B", "probe.budget=1", "probe.batch=8", "probe.width=16"]
    refused(capsys, train(three, tmp_path / "probe", *probe, "train.steps=100", stage="probe"), *says)
    assert not list(tmp_path.glob("probe/probe/*"))
    assert main(train(three, tmp_path / "unseen", "data.verify=false")) == 0


def test_a_flipped_bit_that_is_found_while_training(three, tmp_path, capsys, monkeypatch):
    """A large set is compared beside training, which stops; what was saved before stays, nothing is added to it."""
    out, shard = tmp_path / "run", three / "shard-00001.safetensors"
    flip(shard)
    compare = verify.check_hash

    def after_a_checkpoint(*arguments):
        while not checkpoint.steps(out / "checkpoints"):
            time.sleep(0.01)
        compare(*arguments)

    monkeypatch.setattr(verify, "check_hash", after_a_checkpoint)
    monkeypatch.setattr(stages, "AT_ONCE", 0)
    line = refused(capsys, train(three, out, "train.steps=20000"), f"{shard}: altered (hash ", "training stopped at")
    last = checkpoint.newest(out / "checkpoints")[0]
    assert line.endswith(f"the last checkpoint is {last}")
    stopped = int(re.search(r"stopped at step (\d+)", line)[1])
    assert stopped - 2 <= checkpoint.read_state(last).step <= stopped
    flip(shard)
    monkeypatch.setattr(verify, "check_hash", compare)
    assert main(train(three, out, f"train.steps={stopped + 3}")) == 0
    flip(shard)
    never = threading.Event()
    monkeypatch.setattr(verify, "check_hash", lambda *_: never.wait())
    assert main(train(three, out, f"train.steps={stopped + 4}")) == 0
    never.set()
    assert "only 0 of 3 shards were compared with their hashes" in capsys.readouterr().out


def test_a_flipped_bit_that_is_found_while_probing(three, tmp_path, capsys, monkeypatch):
    """In the middle of a probe's steps, and at its end."""
    flip(three / "shard-00001.safetensors")
    monkeypatch.setattr(stages, "AT_ONCE", 0)
    compare, batch, save, begun = verify.check_hash, network.training_batch, stages.save_schedule, threading.Event()

    def counted(*arguments):
        begun.set()
        return batch(*arguments)

    def later(*arguments):
        begun.wait()
        compare(*arguments)

    def saved(*arguments):
        save(*arguments)
        begun.set()
        [each for each in threading.enumerate() if each.name == "verify latents"][-1].join()

    monkeypatch.setattr(verify, "check_hash", later)
    monkeypatch.setattr(network, "training_batch", counted)
    probe = ["schedule.name=learned", "probe.estimator=B", "probe.budget=1", "probe.batch=8", "probe.width=16"]
    says = "shard-00001.safetensors: altered (hash "
    arguments = train(three, tmp_path / "middle", *probe, "train.steps=10000", stage="probe")
    refused(capsys, arguments, says)
    assert not (tmp_path / "middle" / "schedule.json").exists()
    begun.clear()
    monkeypatch.setattr(network, "training_batch", batch)
    monkeypatch.setattr(stages, "save_schedule", saved)
    refused(capsys, train(three, tmp_path / "end", *probe, "train.steps=100", stage="probe"), says)
    assert (tmp_path / "end" / "schedule.json").exists()


def test_a_large_set_that_is_right(three, tmp_path, capsys, monkeypatch):
    compare = verify.check_hash
    monkeypatch.setattr(stages, "AT_ONCE", 0)
    done = []

    def noted(*arguments):
        compare(*arguments)
        done.append(arguments)

    monkeypatch.setattr(verify, "check_hash", noted)
    batch = ShardLatents.batch

    def waits(latents, *arguments):
        while latents.verification is not None and len(done) < 3:
            time.sleep(0.01)
        return batch(latents, *arguments)

    monkeypatch.setattr(ShardLatents, "batch", waits)
    assert main(train(three, tmp_path / "run", "train.steps=50")) == 0
    said = capsys.readouterr()
    assert said.err.count("latents: the hashes of this process's 3 shards are right (") == 1
    assert "only" not in said.out


def test_more_and_fewer_classes_than_the_model(latents, tmp_path, capsys):
    for classes in (1, 3):
        arguments = train(latents, tmp_path / "run", f"model.classes={classes}")
        refused(capsys, arguments, f"model.classes: {classes}", "has 2")
    assert not (tmp_path / "run").exists()


def test_one_class_is_trained_and_sampled(images, tmp_path):
    shutil.rmtree(images / "class 1")
    latents, out = tmp_path / "latents", tmp_path / "run"
    assert main(["encode", str(images), "--out", str(latents), *ENCODE]) == 0
    one = ["model.classes=1", "train.batch=4", "representations.decoder=texture", "sample.count=3", "sample.steps=1"]
    assert main(train(latents, out, *one)) == 0
    assert main(train(latents, out, *one, stage="sample")) == 0
    assert len(list(out.glob("samples/*/samples.npz"))) == 1


def test_the_decoder_of_other_latents(latents, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(train(latents, out)) == 0
    for decoder, says in (
        ("texture2", "is no file and no representation"),
        ("", "give the texture autoencoder's weights"),
        ("lowfreq", "the latents were made by"),
    ):
        setting = f"representations.decoder={decoder}"
        refused(capsys, train(latents, out, setting, stage="sample"), "representations.decoder", decoder, says)
        assert not list(out.glob("samples/*/*.npz"))
    right = [
        "representations.decoder=texture",
        "sample.count=2",
        "sample.steps=1",
    ]  # a run trained without one takes it
    assert main(["sample", "--out", str(out), *(part for setting in right for part in ("--set", setting))]) == 0
    assert len(list(out.glob("samples/*/samples.npz"))) == 1


def test_what_scoring_latents_needs_is_asked_for_before_any_work(latents, tmp_path, capsys):
    out, decoder = tmp_path / "run", "representations.decoder=texture"
    for more, *says in (
        ([decoder], "evaluate.features", "inception"),
        ([decoder, "evaluate.features=inception"], "evaluate.reference", "(empty)"),
        ([decoder, "evaluate.features=inception", "evaluate.reference=none.npz"], "evaluate.reference", "no such file"),
        ([], "representations.decoder", "(empty)"),
    ):
        refused(capsys, train(latents, out, *more, stage="run"), *says)
        assert not out.exists()


def test_deepspeed_missing_is_named_before_any_work(latents, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    arguments = train(latents, tmp_path / "run", "train.engine=deepspeed")
    refused(capsys, arguments, "package deepspeed: not installed: install it with: pip install 'fastasync[deepspeed]'")
    assert not (tmp_path / "run").exists()


def test_the_folder_of_latents_is_opened_twice_in_all(latents, tmp_path, monkeypatch):
    """Once to check it before anything is written, once to train on."""
    from fastasync import inputs, stages

    opened = []
    for module in (inputs, stages):

        def count(*arguments, original=module.open_latents, **options):
            opened.append(arguments)
            return original(*arguments, **options)

        monkeypatch.setattr(module, "open_latents", count)
    assert main(train(latents, tmp_path / "run")) == 0
    assert len(opened) == 2


def test_a_published_folder(tmp_path, capsys):
    """SFD's layout, no image of the last class; refused without statistics, or with more classes than the model."""
    from safetensors.torch import save_file

    folder, out = tmp_path / "sfd", tmp_path / "run"
    folder.mkdir()
    shapes = {"latents": (48, 8, 8), "latents_sv": (3, 8, 8)}
    tensors = {name: torch.randn(12, *shape) for name, shape in shapes.items()}
    save_file({**tensors, "labels": torch.arange(12) % 3}, folder / "latents_rank00_shard000.safetensors")
    published = train(folder, out, "representations.names=texture,semantic", "model.classes=4")
    for name, (channels, _, _) in shapes.items():
        refused(capsys, published, f"{name}_stats.pt: missing: the latents cannot be normalised")
        statistics = {"mean": torch.zeros(1, channels, 1, 1), "std": torch.ones(1, channels, 1, 1)}
        torch.save(statistics, folder / f"{name}_stats.pt")
    refused(capsys, [*published, "--set", "model.classes=2"], "label of image 2: 2: must be in 0..1")
    assert not out.exists()
    assert main(published) == 0
    refused(capsys, ["check-latents", folder], str(folder), "has no hashes to compare")
    refused(capsys, ["verify", folder], f"checkpoint: {folder}: holds none")


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """few(kind, method, most): a device of 3 GiB on which a method runs out of memory above so many images."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**33))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**31)

    def limit(kind, method, most):
        whole = getattr(kind, method)

        def limited(self, images, *rest, **options):
            if len(images) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return whole(self, images, *rest, **options)

        monkeypatch.setattr(kind, method, limited)

    return limit


def test_out_of_memory_while_encoding(place, images, few, capsys):
    """What it says works; a representation that divides a batch itself is named with its own option."""
    few(Bundle, "encode", 4)
    encode = ["encode", images, "--out", place / "out", *ENCODE]
    refused(capsys, encode, "--batch: 8: out of memory with the 3 GiB", "try --batch 4 (finished shards are kept)")
    assert main([*map(str, encode), "--batch", "4"]) == 0
    refused(capsys, [*encode[:3], place / "one", *ENCODE, "--batch", "5"], "try --batch 2 (")
    few(Bundle, "encode", 0)
    refused(capsys, [*encode[:3], place / "one", *ENCODE, "--batch", "1"], "--batch: 1: ", "use a device with more")
    plugin = place / "chunks.py"
    plugin.write_text(CHUNKS)
    chunked = ["--plugin", plugin, "--representations", "texture,chunked", "--option", "chunked.chunk=6"]
    few(Bundle, "encode", 4)
    encode = ["encode", images, "--out", place / "two", *ENCODE, *chunked]
    refused(capsys, encode, "try --option chunked.chunk=3, or --batch 4 (finished shards are kept)")


CHUNKS = """
from fastasync.representations import Representation, register

@register("chunked")
class Chunked(Representation):
    channels = 1

    def __init__(self, image_shape, grid, chunk=32):
        super().__init__(image_shape, grid)
        self.chunk = chunk

    def encode(self, images):
        return images[:, :1, : self.grid, : self.grid].float()
"""


def test_out_of_memory_while_training_a_semvae(place, few, capsys):
    make_features(place / "features")
    few(SemVAE, "standardise", 4)
    arguments = ["train-semvae", "--features", place / "features", *SEMVAE]
    says = ("--batch: 8: out of memory with the 3 GiB", "try --batch 4 (another training: give a new --out)")
    refused(capsys, [*arguments, "--out", place / "a"], *says, "or more ranks, which divide it")
    assert main([*map(str, arguments), "--out", str(place / "b"), "--batch", "4"]) == 0


def test_out_of_memory_in_the_probe(three, tmp_path, few, capsys):
    few(LightningDiT, "forward", 6)
    probe = ["schedule.name=learned", "probe.estimator=B", "probe.budget=1", "probe.width=16", "train.steps=400"]
    arguments = train(three, tmp_path / "a", *probe, "probe.batch=8", stage="probe")
    says = ("probe.batch: 8: out of memory with the 3 GiB", "try probe.batch=4 (another probe: give a new --out)")
    refused(capsys, arguments, *says)
    arguments = train(three, tmp_path / "a", *probe, "probe.batch=8", stage="train")
    refused(capsys, arguments, *says)
