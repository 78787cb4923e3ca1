"""The autoencoder: weights in the latent-diffusion layout mean the same here as in a plain implementation of it."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastasync_kernels.reference import philox_normal

from fastasync.errors import UserError
from fastasync.representations import build
from fastasync.representations.autoencoder import architecture, image_keys, ldm_name, ldm_state, load_autoencoder
from fastasync.representations.base import checked_encode
from fastasync.representations.texture import to_float, to_uint8
from fastasync.representations.weights import import_model_package


def _reference():
    spec = importlib.util.spec_from_file_location("ldm_reference", Path(__file__).with_name("ldm_reference.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LDMAutoencoder = _reference().LDMAutoencoder
SHAPE, GRID = (3, 16, 16), 4


class Callback:  # what training frameworks pickle beside the weights
    def __init__(self):
        self.best = torch.zeros(1)


@pytest.fixture(scope="module")
def ldm():
    torch.manual_seed(0)
    model = LDMAutoencoder(32, (1, 2, 2), 2, [False, False, True], z=4)
    for parameter in model.parameters():  # no weight or bias at a special value
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(ldm, tmp_path_factory):
    """A file in exactly the published layout: a wrapper, the loss network beside the weights, a pickled object."""
    path = tmp_path_factory.mktemp("ldm") / "ldm.ckpt"
    loss = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(8, 3, 4, 4)}
    torch.save({"state_dict": ldm.state_dict() | loss, "epoch": 50, "callbacks": {"best": Callback()}}, path)
    return str(path)


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (5, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_moments_and_images_are_those_of_the_plain_implementation(ldm, checkpoint, images):
    vae, x = load_autoencoder(checkpoint), to_float(images)
    posterior = vae.encode(x).latent_dist
    mean, std = ldm.moments(x)
    torch.testing.assert_close(posterior.mean, mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(posterior.std, std, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vae.decode(mean).sample, ldm.decode(mean), rtol=1e-5, atol=1e-5)
    assert mean.std() > 0.1
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_the_published_architecture():
    """ldm-imagenet256-f16d32: 69.8 M parameters, attention on the 16x16 level, each name used once."""
    with torch.device("meta"):
        published = LDMAutoencoder(128, (1, 1, 2, 2, 4), 2, [False] * 4 + [True], z=32).state_dict()
    settings = architecture(published)
    assert settings["block_out_channels"] == (128, 128, 256, 256, 512)
    assert (settings["latent_channels"], settings["layers_per_block"]) == (32, 2)
    with torch.device("meta"):
        model = import_model_package("diffusers").AutoencoderKL(**settings)
    assert sum(parameter.numel() for parameter in model.parameters()) == 69_836_067
    assert sorted(ldm_name(name, 5) for name in model.state_dict()) == sorted(published)
    for name, value in ldm_state(model).items():
        assert value.shape == published[name].shape, name
    assert "decoder.up.4.attn.2.proj_out.weight" in published


@torch.no_grad()
def test_representation(ldm, checkpoint, images):
    item = build("autoencoder", SHAPE, GRID, weights=checkpoint, chunk=2)
    assert (item.channels, item.decodes) == (4, True)
    mean, _ = ldm.moments(to_float(images))
    latents = checked_encode(item, images)
    torch.testing.assert_close(latents, mean, rtol=1e-5, atol=1e-5)
    decoded, expected = item.decode(mean), to_uint8(ldm.decode(mean))
    assert decoded.dtype == torch.uint8
    assert decoded.shape == images.shape
    assert (decoded.int() - expected.int()).abs().max() <= 1  # a value on the edge of two integers
    assert (decoded == expected).float().mean() > 0.99
    assert checked_encode(item, images[:0]).shape == (0, 4, 4, 4)
    assert item.decode(latents[:0]).shape == (0, *SHAPE)
    bfloat = build("autoencoder", SHAPE, GRID, weights=checkpoint, precision="bfloat16").encode(images)
    assert bfloat.dtype == torch.float32
    assert 0 < (bfloat - latents).norm() < 0.05 * latents.norm()


@torch.no_grad()
def test_a_sample_is_the_same_in_any_batch(ldm, checkpoint, images):
    item = build("autoencoder", SHAPE, GRID, weights=checkpoint, sample=True, seed=3, chunk=2)
    latents = checked_encode(item, images)
    mean, std = ldm.moments(to_float(images))
    noise = philox_normal(3, 0, image_keys(images), 64, stream=8).view_as(mean)
    torch.testing.assert_close(latents, mean + std * noise, rtol=1e-5, atol=1e-5)
    order = [4, 1, 0]
    torch.testing.assert_close(item.encode(images[order]), latents[order], rtol=1e-5, atol=1e-5)
    drawn = (item.encode(images.flip(-1)) - ldm.moments(to_float(images.flip(-1)))[0]) / std  # of the mirrored images
    assert (drawn - noise).abs().mean() > 0.5
    other = build("autoencoder", SHAPE, GRID, weights=checkpoint, sample=True, seed=4)
    assert not torch.allclose(other.encode(images), latents)


def test_image_keys():
    """Any pixel changes the key, and keys of images that differ in one pixel are spread over 32 bits."""
    image = torch.full((1, *SHAPE), 200, dtype=torch.uint8)
    near = image.repeat(768, 1, 1, 1)
    near.flatten(1).diagonal().sub_(1)
    keys = image_keys(torch.cat([image, near]))
    assert len(keys.unique()) == 769
    assert int(keys.min()) >= 0
    assert int(keys.max()) < 2**32
    halves = (keys >> torch.arange(32)[:, None]) & 1
    assert ((halves.double().mean(1) - 0.5).abs() < 0.1).all()  # 5.5 standard deviations of 769 fair draws


def test_the_fingerprint_is_of_the_weights_not_of_the_path(ldm, checkpoint, tmp_path):
    def fingerprint(path, **options):
        return build("autoencoder", SHAPE, GRID, weights=str(path), **options).fingerprint()

    diffusers_layout = tmp_path / "vae.pt"
    torch.save(load_autoencoder(checkpoint).state_dict(), diffusers_layout)
    changed = tmp_path / "changed.pt"
    state = ldm.state_dict()
    torch.save(state | {"quant_conv.bias": state["quant_conv.bias"] + 1e-3}, changed)
    first = fingerprint(checkpoint)
    assert fingerprint(diffusers_layout, chunk=7) == first
    others = [fingerprint(changed), fingerprint(checkpoint, sample=True), fingerprint(checkpoint, precision="bfloat16")]
    others.append(fingerprint(checkpoint, sample=True, seed=1))
    assert len({first, *others}) == 5
    decoder = build("autoencoder", SHAPE, GRID, weights=checkpoint)  # however the latents were drawn
    assert [decoder.fits(each) for each in (first, *others)] == [True, False, True, True, False]


def test_weights_go_out_in_the_layout_they_came_in(ldm, checkpoint):
    exported = ldm_state(load_autoencoder(checkpoint))
    assert exported.keys() == ldm.state_dict().keys()
    assert all(torch.equal(exported[name], value) for name, value in ldm.state_dict().items())


def _without(part):
    return lambda state: {name: value for name, value in state.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("decoder.up.1.block.2"), "architecture.*missing: decoder.up_blocks.1.resnets.2"),
        (_without("encoder."), "another architecture"),
        (_without("post_quant_conv"), "another architecture.*post_quant_conv"),
        (lambda state: state | {"decoder.extra.weight": torch.zeros(2)}, "unexpected: decoder.extra.weight"),
        (lambda state: state | {"encoder.conv_in.bias": torch.zeros(7)}, r"shape: encoder.conv_in.bias \[7\]"),
        (lambda state: {"step": 3}, "no weights in it"),
    ],
)
def test_weights_of_another_architecture(ldm, tmp_path, change, message):
    path = tmp_path / "vae.ckpt"
    torch.save(change(dict(ldm.state_dict())), path)
    with pytest.raises(UserError, match=message):
        load_autoencoder(str(path))


def test_missing_and_broken_files(checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"not given.*ldm-imagenet256-f16d32"):
        build("autoencoder", SHAPE, GRID)
    with pytest.raises(UserError, match="no such file"):
        load_autoencoder(str(tmp_path / "none.ckpt"))
    whole = Path(checkpoint).read_bytes()
    for name, data in (("cut.ckpt", whole[: len(whole) // 2]), ("text.ckpt", b"<html>"), ("x.safetensors", whole[:99])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match="cut short, or not a file of weights"):
            load_autoencoder(str(tmp_path / name))


class _Harmful:
    def __init__(self, action, *arguments):
        self.action, self.arguments = action, arguments

    def __reduce__(self):
        return (self.action, self.arguments)


def test_no_code_of_a_file_is_run(ldm, tmp_path):
    path, made = tmp_path / "vae.ckpt", tmp_path / "made"
    torch.save({"state_dict": ldm.state_dict(), "hook": _Harmful(shutil.copytree, str(tmp_path), str(made))}, path)
    load_autoencoder(str(path))  # not called: something inert stands in its place
    torch.save({"state_dict": ldm.state_dict(), "hook": _Harmful(os.mkdir, str(made))}, path)
    with pytest.raises(UserError, match="not a file of weights"):
        load_autoencoder(str(path))
    assert not made.exists()


def test_options_and_images_are_checked(checkpoint):
    with pytest.raises(UserError, match=r"images: 3x32x32: these weights make a 4x4 grid of 3x16x16 images"):
        build("autoencoder", (3, 32, 32), GRID, weights=checkpoint)
    with pytest.raises(UserError, match="precision"):
        build("autoencoder", SHAPE, GRID, weights=checkpoint, precision="float23")
    with pytest.raises(UserError, match="chunk: 0"):
        build("autoencoder", SHAPE, GRID, weights=checkpoint, chunk=0)


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"package diffusers: not installed.*fastasync\[imagenet\]"):
        load_autoencoder("any.ckpt")


def test_importing_the_representations_imports_neither_diffusers_nor_timm():
    code = (
        "import sys, fastasync.representations, fastasync.representations.train_semvae;"
        "sys.exit((sorted({'diffusers', 'timm', 'torchvision', 'transformers'} & set(sys.modules)) or 0))"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
