"""The shard format: what is written is read back, exactly, and whatever is wrong is one clear line."""

import errno
import json
import os
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastasync.data.shards import (
    MappedFile,
    begin,
    check_latents,
    finish,
    is_finished,
    open_shards,
    read_index,
    write_shard,
)
from fastasync.errors import UserError


def test_round_trip_and_layout(folder, encoding, content):
    index, whole = read_index(folder), content(encoding())
    assert index.encoding == encoding()
    assert [record["count"] for record in index.shards] == [5, 5, 5, 5, 3]
    files = list(open_shards(folder, index))
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([file.tensors[name] for file in files]), tensor), name
    # any safetensors reader sees the same
    assert torch.equal(load_file(files[4].path)["latents.third"], whole["latents.third"][20:])
    assert check_latents(folder, progress=False).problems == []


def test_statistics_are_exact_and_of_the_unmirrored_images(folder, encoding, content):
    whole = content(encoding())
    raw = torch.cat([whole[f"latents.{name}"] for name in ("texture", "semantic", "third")], 1).double()
    statistics = read_index(folder).statistics
    torch.testing.assert_close(torch.tensor(statistics.mean).double(), raw.mean((0, 2, 3)), rtol=1e-6, atol=1e-9)
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (statistics.mean, statistics.std))
    assert (mean - raw.mean((0, 2, 3))).abs().max() < 1e-14
    assert (std - raw.std((0, 2, 3))).abs().max() < 1e-13
    assert statistics.representations == ("f1", "f2", "f3")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_statistics_are_of_the_stored_values(tmp_path, encoding, content, write, dtype):
    half = encoding(dtype=dtype, features="", features_shape=(), flip=False)
    whole = content(half)
    assert whole["latents.texture"].dtype == getattr(torch, dtype)
    index = read_index(write(tmp_path / "half", half, whole))
    stored = torch.cat([whole[f"latents.{name}"] for name in half.names], 1).double()
    assert (torch.tensor(index.statistics.std, dtype=torch.float64) - stored.std((0, 2, 3))).abs().max() < 1e-13
    assert check_latents(tmp_path / "half", progress=False).problems == []


def test_order_of_writing_does_not_change_the_index(tmp_path, folder, encoding, content):
    one, whole = encoding(), content(encoding())
    begin(tmp_path / "other", one)
    for done, shard in enumerate((3, 0, 4, 2, 1)):
        assert finish(tmp_path / "other", one) == 5 - done
        assert not (tmp_path / "other" / "index.json").exists()
        first, last = one.bounds(shard)
        write_shard(tmp_path / "other", one, shard, {name: value[first:last] for name, value in whole.items()})
    assert finish(tmp_path / "other", one) == 0
    assert sorted(os.listdir(tmp_path / "other")) == sorted(os.listdir(folder))
    for name in os.listdir(folder):
        assert (tmp_path / "other" / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_lost_record_is_made_again_exactly(folder, encoding):
    record, index = (folder / "shard-00002.json").read_bytes(), (folder / "index.json").read_bytes()
    (folder / "shard-00002.json").unlink()  # killed between the shard and its record
    (folder / "index.json").unlink()
    assert finish(folder, encoding()) == 1
    assert is_finished(folder, encoding(), 2)
    assert (folder / "shard-00002.json").read_bytes() == record
    assert finish(folder, encoding()) == 0
    assert (folder / "index.json").read_bytes() == index


def test_another_encoding_is_refused(folder, encoding):
    for change, message in (
        (dict(images="images-2"), "begun from 23 images, 0 bad ones left out; asked for others: choose"),
        (dict(fingerprints=("f1", "fX", "f3")), r'fingerprints \["f1", "f2", "f3"\], asked for \["f1", "fX", "f3"\]'),
        (dict(dtype="float16"), "dtype float32, asked for float16"),
        (dict(shard_size=6), "shard_size 5, asked for 6"),
    ):
        with pytest.raises(UserError, match=message):
            begin(folder, encoding(**change))
    begin(folder, encoding())


def test_foreign_folders_are_refused(tmp_path, encoding):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds thesis.tex, and no encoding.json: choose an empty"):
        begin(tmp_path, encoding())
    with pytest.raises(UserError, match="not a folder"):
        begin(tmp_path / "thesis.tex", encoding())
    with pytest.raises(
        UserError, match=r"holds no index.json, not encoded latents: give the --out of `fastasync encode`"
    ):
        read_index(tmp_path)
    begin(tmp_path / "new", encoding())
    with pytest.raises(UserError, match="encoding has not finished"):
        read_index(tmp_path / "new")


def flip_byte(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x40
    path.write_bytes(data)


def test_every_flipped_byte_of_the_index_is_noticed(folder):
    path = folder / "index.json"
    good = path.read_bytes()
    meaning = [at for at, byte in enumerate(good) if not chr(byte).isspace()]
    for position in meaning[:: max(len(meaning) // 200, 1)]:
        flip_byte(path, position)
        with pytest.raises(UserError, match=r"index.json: (altered|not readable|format)"):
            read_index(folder)
        path.write_bytes(good)
    read_index(folder)


def test_a_flipped_byte_in_a_shard(folder):
    path = folder / "shard-00001.safetensors"
    flip_byte(path, path.stat().st_size - 100)
    list(open_shards(folder, read_index(folder)))  # the size and layout are right
    problems = check_latents(folder, progress=False).problems
    assert len(problems) == 1
    assert "shard-00001.safetensors: altered" in problems[0]
    assert "run the same `fastasync encode` again" in problems[0]


def test_every_flipped_byte_of_a_shards_header_is_noticed(folder):
    path = folder / "shard-00003.safetensors"
    good = path.read_bytes()
    for position in range(0, 8 + struct.unpack("<Q", good[:8])[0], 7):
        flip_byte(path, position)
        assert check_latents(folder, progress=False).problems, position
        path.write_bytes(good)


def test_what_cannot_be_read_is_not_to_be_deleted(folder, monkeypatch):
    """It may be whole: a permission, a disk that is away."""
    index, shard = read_index(folder), folder / "shard-00000.safetensors"
    shard.unlink()
    shard.symlink_to(shard.name)  # as root too, it cannot be opened: ELOOP
    with pytest.raises(UserError, match=r"shard-00000.safetensors: .*: check its permissions and its disk$"):
        list(open_shards(folder, index))

    def denied(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(UserError, match=r"index.json: Permission denied: check its permissions and its disk$"):
        read_index(folder)


def test_missing_and_truncated_shards(folder):
    index = read_index(folder)
    path = folder / "shard-00004.safetensors"
    good = path.read_bytes()
    for length in (0, 5, 50, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(
            UserError, match=r"shard-00004.safetensors: .*(cut short|not a readable).*delete it and run"
        ):
            list(open_shards(folder, index))
    path.unlink()
    (folder / "shard-00000.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard-00000.safetensors: missing: run the same"):
        list(open_shards(folder, index))
    problems = check_latents(folder, progress=False).problems
    assert [problem.split(":")[0].rpartition("/")[2] for problem in problems] == [
        "shard-00000.safetensors",
        "shard-00004.safetensors",
    ]


def test_a_shard_of_another_dtype(folder, encoding, content):
    half, good = encoding(dtype="float16"), (folder / "shard-00000.safetensors").read_bytes()
    whole = content(half)
    save_file({name: tensor[:5].contiguous() for name, tensor in whole.items()}, folder / "shard-00000.safetensors")
    with pytest.raises(UserError, match=r"shard-00000.safetensors: \d+ bytes, the index says \d+"):
        list(open_shards(folder, read_index(folder)))
    # of the same number of bytes, so that only the layout tells
    tensors = load_file(folder / "shard-00001.safetensors")
    path = folder / "shard-00001.safetensors"
    data = path.read_bytes().replace(b'"F32","shape":[5,3,4,4]', b'"I32","shape":[5,3,4,4]')
    path.write_bytes(data)
    (folder / "shard-00000.safetensors").write_bytes(good)
    with pytest.raises(UserError, match=r"shard-00001.*latents.* is int32 \[5, 3, 4, 4\], the index says float32"):
        list(open_shards(folder, read_index(folder)))
    assert tensors["labels"].dtype == torch.int64


def test_shards_of_another_encoding_with_the_same_layout(tmp_path, folder, encoding, content, write):
    """Whichever of its files was copied, at opening and not by hashes; and encoding again does not take it over."""
    other = encoding(fingerprints=("f1", "fX", "f3"))
    theirs = write(tmp_path / "theirs", other, content(other, seed=1))
    name, index = "shard-00001.safetensors", read_index(folder)
    good = (folder / name).read_bytes()
    said = f"{name}: is another shard, or of another encoding"
    for stranger in (theirs / name, folder / "shard-00002.safetensors"):
        (folder / name).write_bytes(stranger.read_bytes())
        with pytest.raises(UserError, match=said):
            list(open_shards(folder, index))
        assert said in check_latents(folder, progress=False).problems[0]
        (folder / "shard-00001.json").write_bytes(stranger.with_suffix(".json").read_bytes())
        assert not is_finished(folder, encoding(), 1)
        (folder / "shard-00001.json").unlink()
        assert not is_finished(folder, encoding(), 1)
    header = json.loads(good[8 : 8 + struct.unpack("<Q", good[:8])[0]])
    assert header["__metadata__"] == encoding().mark(1)
    del header["__metadata__"]  # a folder of before: read as it is
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    old = struct.pack("<Q", len(text)) + text + good[8 + struct.unpack("<Q", good[:8])[0] :]
    (folder / name).write_bytes(old)
    shards = tuple({**each, "bytes": len(old)} if each["file"] == name else each for each in index.shards)
    assert len(list(open_shards(folder, replace(index, shards=shards)))) == 5


def test_wrong_statistics_and_labels_are_found(folder, encoding, content, write, tmp_path):
    from fastasync.data.shards import read_signed, write_signed
    from fastasync.representations.statistics import LatentStatistics

    index = read_signed(folder / "index.json", "")
    mean = [value + 1e-6 for value in index["statistics"]["mean"]]
    statistics = LatentStatistics(tuple(mean), tuple(index["statistics"]["std"]), ("f1", "f2", "f3"))
    index["statistics"] |= {"mean": mean, "fingerprint": statistics.fingerprint()}
    write_signed(folder / "index.json", index)
    (problem,) = check_latents(folder, progress=False).problems
    assert "mean of channel 0" in problem

    whole = content(encoding())
    whole["labels"][7] = 3
    write(tmp_path / "labels", encoding(), whole)
    (problem,) = check_latents(tmp_path / "labels", progress=False).problems
    assert "shard-00001.safetensors: label of image 2: 3: must be in 0..2" in problem


def test_not_finite_and_never_varying_latents(tmp_path, encoding, content, write):
    half = encoding(dtype="float16")
    whole = content(encoding())
    whole = {name: value.half() if name.startswith("latents") else value for name, value in whole.items()}
    whole["latents_flip.semantic"][12, 1, 0, 0] = 70000.0  # infinity in float16
    with pytest.raises(UserError, match=r"latents_flip.semantic of image 12: not finite in torch.float16: use --dtype"):
        write(tmp_path / "a", half, whole)
    assert sorted(os.listdir(tmp_path / "a")) == [
        "encoding.json", "shard-00000.json", "shard-00000.safetensors", "shard-00001.json", "shard-00001.safetensors",
    ]  # fmt: skip
    for value in (float("nan"), float("-inf")):
        for name, where in (("latents.texture", (20, 2, 3, 3)), ("feats_flip", (7, 0, 5))):
            broken = content(encoding())
            broken[name][where] = value
            with pytest.raises(UserError, match=f"{name} of image {where[0]}: not finite"):
                write(tmp_path / f"{name}{value}", encoding(), broken)
    flat = content(encoding())
    flat["latents.semantic"][:, 1] = 4.0
    with pytest.raises(UserError, match=r"representation semantic: std of channel 1: 0.0: must be positive"):
        write(tmp_path / "b", encoding(), flat)


def test_files_that_are_no_safetensors(tmp_path):
    for content in (b"", b"\x10\0\0\0\0\0\0\0[1, 2, 3]       ", b"\xff" * 64, json.dumps({"a": 1}).encode()):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(UserError, match="not a readable safetensors file"):
            MappedFile(tmp_path / "x", "again")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KiB, where it can be had (as root)."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", mount], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield mount
    subprocess.run(["mount", "-o", "remount,rw", mount], check=False)
    subprocess.run(["umount", mount], check=True)


def test_a_full_disk_leaves_no_half_file(small_disk, encoding, content):
    one = encoding(features_shape=(16, 400))  # 130 kB of features in a shard
    whole = content(one)
    begin(small_disk / "out", one)

    def write_all():
        for shard in range(one.shards):
            first, last = one.bounds(shard)
            write_shard(small_disk / "out", one, shard, {name: value[first:last] for name, value in whole.items()})

    with pytest.raises(UserError, match="no space left on the device: free some and run the same command again"):
        write_all()
    left = sorted(os.listdir(small_disk / "out"))
    assert not [name for name in left if name.startswith(".")]
    assert left[:2] == ["encoding.json", "shard-00000.json"]
    assert is_finished(small_disk / "out", one, 0)


def test_a_read_only_disk(small_disk, encoding):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match="Read-only file system: choose a folder that can be written to"):
        begin(small_disk / "out", encoding())


def test_a_full_disk_without_a_mount(tmp_path, encoding, content, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    one, whole = encoding(), content(encoding())
    begin(tmp_path / "out", one)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="no space left on the device"):
        write_shard(tmp_path / "out", one, 0, {name: value[:5] for name, value in whole.items()})
    assert os.listdir(tmp_path / "out") == ["encoding.json"]


def test_mapping_does_not_hold_files_open(folder):
    before = len(os.listdir("/proc/self/fd"))
    files = list(open_shards(folder, read_index(folder)))
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(files) == 5
