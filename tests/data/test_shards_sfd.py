"""Folders of SFD and LightningDiT are read as they are, and refused clearly when something is off."""

import pytest
import torch
from safetensors.torch import save_file

from fastasync.data.sfd_folder import SFDLatents, is_sfd_folder
from fastasync.data.shard_loader import open_latents
from fastasync.errors import UserError

SHAPES = {"latents": (32, 4, 4), "latents_sv": (16, 4, 4), "feats_dino": (24, 4, 4)}


def shard_of(count: int, seed: int, keys=tuple(SHAPES), dtype=torch.float32, flip=True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = [name for key in keys for name in ((key, f"{key}_flip") if flip else (key,))]
    tensors = {
        name: torch.randn(count, *SHAPES[name.removesuffix("_flip")], generator=generator).to(dtype) for name in names
    }
    return {**tensors, "labels": torch.randint(10, (count,), generator=generator)}


def write_statistics(folder, key: str, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    mean = torch.linspace(-1, 1, channels).reshape(1, -1, 1, 1)
    std = torch.linspace(0.5, 2, channels).reshape(1, -1, 1, 1)
    torch.save({"mean": mean, "std": std}, folder / f"{key}_stats.pt")
    return mean, std


@pytest.fixture
def sfd(tmp_path):
    """Two shards of 5 and 3 images, written in an order that is not that of their names."""
    save_file(shard_of(3, 1), tmp_path / "latents_rank01_shard000.safetensors")
    save_file(shard_of(5, 0), tmp_path / "latents_rank00_shard000.safetensors")
    write_statistics(tmp_path, "latents", 32)
    write_statistics(tmp_path, "latents_sv", 16)
    return tmp_path


def test_values_order_flips_and_features(sfd):
    assert is_sfd_folder(sfd)
    latents = SFDLatents(sfd, features=True, classes=10)
    assert (len(latents), latents.classes, latents.names) == (8, 10, ("texture", "semantic"))
    first, second = shard_of(5, 0), shard_of(3, 1)
    mean, std = write_statistics(sfd, "latents", 32)
    mean_sv, std_sv = write_statistics(sfd, "latents_sv", 16)
    flips = torch.tensor([True, False, True])
    z, y = latents.batch(torch.tensor([7, 0, 4]), flips)
    for row, (shard, at, view) in enumerate(((second, 2, "_flip"), (first, 0, ""), (first, 4, "_flip"))):
        assert torch.equal(z[row, :32], ((shard[f"latents{view}"][at] - mean) / std)[0])
        assert torch.equal(z[row, 32:], ((shard[f"latents_sv{view}"][at] - mean_sv) / std_sv)[0])
        assert y[row] == shard["labels"][at]
    features = latents.features(torch.tensor([7, 0, 4]), flips)
    assert features.shape == (3, 16, 24)
    # token (row, column) of the grid is number 4 * row + column
    assert torch.equal(features[0].reshape(4, 4, 24)[1, 2], second["feats_dino_flip"][2, :, 1, 2])
    assert SFDLatents(sfd).classes == 1 + int(max(first["labels"].max(), second["labels"].max()))
    assert SFDLatents(sfd).statistics_fingerprint == latents.statistics_fingerprint
    assert isinstance(open_latents(sfd), SFDLatents)


def test_reading_ahead(sfd):
    def order(step):
        return torch.tensor([step, 7 - step]), torch.tensor([True, False])

    with SFDLatents(sfd, features=True) as latents, SFDLatents(sfd, features=True) as direct:
        latents.prefetch(order, 0, 8)
        for step in range(8):
            assert torch.equal(latents.batch(*order(step))[0], direct.batch(*order(step))[0])
            assert torch.equal(latents.features(*order(step)), direct.features(*order(step)))
        assert latents.served_ahead == 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lightningdit_folders_and_half_precision(tmp_path, dtype):
    content = shard_of(4, 0, keys=("latents",), dtype=dtype, flip=False)
    save_file(content, tmp_path / "latents_rank00_shard000.safetensors")
    mean, std = write_statistics(tmp_path, "latents", 32)
    latents = SFDLatents(tmp_path)
    assert latents.names == ("texture",)
    assert latents.features is None
    z, _ = latents.batch(torch.arange(4), torch.ones(4, dtype=torch.bool))  # no mirrored view: flips are ignored
    assert torch.equal(z, (content["latents"].float() - mean) / std)


def test_missing_or_wrong_statistics(sfd):
    path = sfd / "latents_sv_stats.pt"
    good = path.read_bytes()
    for content, message in (
        (None, r"latents_sv_stats.pt: missing: the latents cannot be normalised: copy it from where"),
        (b"not a file of torch", "no statistics in it .*: copy it"),
        (good[:-30], "no statistics in it"),
        ({"mean": torch.zeros(1, 16, 1, 1)}, r"no statistics in it \(KeyError\)"),
        ({"mean": torch.zeros(1, 32, 1, 1), "std": torch.ones(1, 32, 1, 1)}, "32 channels, the latents have 16"),
        ({"mean": torch.zeros(1, 16, 1, 1), "std": torch.zeros(1, 16, 1, 1)}, "not finite and positive"),
    ):
        path.unlink(missing_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(UserError, match=message):
            SFDLatents(sfd)


class Payload:
    """What a hostile pickle would do."""

    def __reduce__(self):
        return print, ("code of the file was run",)


def test_statistics_are_data_only(sfd, capsys):
    torch.save({"mean": Payload(), "std": torch.ones(16)}, sfd / "latents_sv_stats.pt")
    with pytest.raises(UserError, match=r"latents_sv_stats.pt: no statistics in it"):
        SFDLatents(sfd)
    assert "was run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(latents=t["latents"][:2]), r"rank01_shard000.safetensors: latents: 2 images, 3 labels"),
        (lambda t: t.update(latents_sv_flip=t["latents_sv_flip"].half()), "the first shard has torch.float32"),
        (lambda t: t.update(latents_sv=t["latents_sv"].double()), "must be one of float32, float16, bfloat16"),
        (lambda t: t.update(latents=t["latents"][:, :31].contiguous()), r"first shard has torch.float32 \[32, 4, 4\]"),
        (lambda t: t.pop("latents_sv"), "latents_sv: missing .the first shard has it"),
        (lambda t: t.pop("labels"), "labels: missing"),
        (lambda t: t.update(labels=t["labels"].float()), "labels: missing or not whole numbers"),
    ],
)
def test_shards_that_do_not_fit(sfd, change, message):
    content = shard_of(3, 1)
    change(content)
    save_file(content, sfd / "latents_rank01_shard000.safetensors")
    with pytest.raises(UserError, match=message):
        SFDLatents(sfd)


def test_truncated_shards_labels_and_empty_folders(sfd, tmp_path):
    with pytest.raises(UserError, match=r"label of image \d+: \d: must be in 0..2"):
        SFDLatents(sfd, classes=3)
    path = sfd / "latents_rank01_shard000.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"rank01_shard000.safetensors: .*cut short.*: download or extract it again"):
        SFDLatents(sfd)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no safetensors files: give a folder of latents"):
        SFDLatents(tmp_path / "empty")
    save_file(shard_of(3, 1, keys=("latents_sv",)), tmp_path / "empty" / "a.safetensors")
    with pytest.raises(UserError, match="no `latents` in it"):
        SFDLatents(tmp_path / "empty")


def test_features_that_are_not_there(tmp_path):
    save_file(shard_of(3, 1, keys=("latents",)), tmp_path / "a.safetensors")
    write_statistics(tmp_path, "latents", 32)
    with pytest.raises(UserError, match=r"no `feats_dino` in it: set objective.repa_weight to 0"):
        SFDLatents(tmp_path, features=True)
