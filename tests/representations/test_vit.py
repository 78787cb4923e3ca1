"""Frozen ViT features, from timm and from a torch.hub folder, and the semantic latent that is made of them."""

import copy
import json
import sys

import pytest
import torch
from torch.nn.functional import interpolate

from fastasync.errors import UserError
from fastasync.representations import build
from fastasync.representations.base import checked_encode
from fastasync.representations.semvae import SemVAE
from fastasync.representations.semvae_file import load_semvae, save_semvae
from fastasync.representations.vit import DINOV2_B, FrozenViT, TokenFeatures
from fastasync.representations.weights import import_model_package

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
GRID = 4

HUBCONF = """
import torch
class Net(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.patch_size, self.embed_dim = 14, width
        self.proj = torch.nn.Conv2d(3, width, 14, stride=14)
    def forward_features(self, x):
        tokens = self.proj(x).flatten(2).transpose(1, 2)
        return {"x_norm_patchtokens": tokens, "x_norm_clstoken": tokens.mean(1)}
def tiny(pretrained=True, width=8):
    assert not pretrained
    return Net(width)
"""


def _vit(weights="", **options):
    return FrozenViT(GRID, weights=str(weights), random_weights=not weights, model_options=TINY, **options)


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network():
    """A timm network at the size of the published files (a grid of 37), with no parameter at a special value."""
    torch.manual_seed(5)
    model = import_model_package("timm").create_model(DINOV2_B, num_classes=0, **TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("vit") / "timm.pth"
    torch.save(network.state_dict(), path)
    return path


@torch.no_grad()
def test_features_are_the_normalised_patch_tokens_of_the_resized_images(network, weights, images):
    vit = _vit(weights, chunk=2)
    features = vit(images)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (images.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    resized = copy.deepcopy(network)
    resized.set_input_size(img_size=56)
    tokens = resized.forward_features(interpolate(x, (56, 56), mode="bicubic"))
    assert tokens.shape == (5, 1 + 4 + 16, 32)  # class, registers, patches
    expected = tokens[:, 5:].reshape(5, GRID, GRID, 32).permute(0, 3, 1, 2)
    assert (features.dtype, features.shape) == (torch.float32, (5, 32, GRID, GRID))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    targets = TokenFeatures(vit)
    assert (targets.shape, targets.fingerprint()) == ((16, 32), vit.fingerprint())
    torch.testing.assert_close(targets(images), tokens[:, 5:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vit.feature_map(images / 127.5 - 1), features)
    assert vit(images[:0]).shape == (0, 32, GRID, GRID)


def test_images_of_the_right_size_are_not_resized(weights):
    vit, x = _vit(weights), torch.rand(1, 3, 56, 56) * 2 - 1
    shifted = x.clone()
    shifted[..., :14, 14:28] = 0.0  # the second patch of the first row
    with torch.no_grad():
        changed = (vit.network.patch_embed((x + 1) / 2) - vit.network.patch_embed((shifted + 1) / 2)).abs().sum(-1)
    assert changed[0].nonzero().tolist() == [[1]]
    assert vit.patch * GRID == 56
    assert not torch.equal(vit.feature_map(x), vit.feature_map(shifted))


def test_the_authors_layout_gives_the_same_features(network, weights, images, tmp_path):
    """Their position embedding has a row for the class token; timm's is added to the token itself."""
    state = network.state_dict()
    row = torch.randn(1, 1, 32)
    authors = {key: value for key, value in state.items() if key != "reg_token"}
    authors |= {
        "register_tokens": state["reg_token"],
        "cls_token": state["cls_token"] - row,
        "pos_embed": torch.cat([row, state["pos_embed"]], dim=1),
        "mask_token": torch.zeros(1, 32),
    }
    path = tmp_path / "dinov2.pth"
    torch.save(authors, path)
    torch.testing.assert_close(_vit(path)(images), _vit(weights)(images), rtol=1e-4, atol=1e-4)


def test_frozen_deterministic_and_identified_by_its_weights(network, weights, images, tmp_path):
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    vit = _vit()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(parameter.requires_grad for parameter in vit.parameters())
    assert not vit.train().network.training
    assert torch.equal(vit(images), _vit()(images))
    copy = tmp_path / "elsewhere.pth"
    torch.save({"teacher": network.state_dict() | {"head.weight": torch.zeros(10, 32)}}, copy)
    assert _vit(copy, chunk=1).fingerprint() == _vit(weights).fingerprint() != vit.fingerprint()
    bfloat = _vit(weights, precision="bfloat16")(images)
    exact = _vit(weights)(images)
    assert 0 < (bfloat - exact).norm() < 0.05 * exact.norm()


def test_the_default_network_at_imagenets_size():
    """[N, 3, 256, 256] -> [N, 768, 16, 16]."""
    vit = FrozenViT(16, random_weights=True, model_options={"depth": 1})
    assert (vit.patch, vit.map_channels) == (14, 768)
    assert vit.network.pos_embed.shape == (1, 256, 768)
    features = vit(torch.zeros(1, 3, 256, 256, dtype=torch.uint8))
    assert features.shape == (1, 768, 16, 16)


def test_a_torch_hub_folder(images, tmp_path):
    (tmp_path / "hubconf.py").write_text(HUBCONF)
    torch.manual_seed(0)
    proj = torch.nn.Conv2d(3, 8, 14, stride=14)
    torch.save({f"proj.{name}": value for name, value in proj.state_dict().items()}, tmp_path / "w.pth")
    vit = FrozenViT(GRID, "tiny", str(tmp_path / "w.pth"), hub=str(tmp_path))
    x = ((images / 127.5 - 1 + 1) / 2 - vit.mean) / vit.std
    with torch.no_grad():
        expected = proj(interpolate(x, (56, 56), mode="bicubic"))
    torch.testing.assert_close(vit(images), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"shape: proj.weight \[8, 3, 14, 14\], expected \[9"):
        FrozenViT(GRID, "tiny", str(tmp_path / "w.pth"), hub=str(tmp_path), model_options={"width": 9})
    with pytest.raises(UserError, match="huge: "):
        FrozenViT(GRID, "huge", str(tmp_path / "w.pth"), hub=str(tmp_path))
    with pytest.raises(UserError, match=r"no hubconf.py"):
        FrozenViT(GRID, "tiny", str(tmp_path / "w.pth"), hub=str(tmp_path / "none"))


def test_bad_weights_and_names(network, weights, tmp_path):
    with pytest.raises(UserError, match=r"not given.*dinov2_vitb14_reg4_pretrain\.pth"):
        FrozenViT(GRID)
    with pytest.raises(UserError, match="no such file"):
        _vit(tmp_path / "none.pth")
    state = network.state_dict()
    broken = {
        "cut.pth": weights.read_bytes()[:5000],
        "deeper.pth": state | {"blocks.2.norm1.weight": torch.zeros(32)},
        "shallow.pth": {key: value for key, value in state.items() if not key.startswith("blocks.1.")},
        "wide.pth": {key: torch.zeros(*value.shape[:-1], 2 * value.shape[-1]) for key, value in state.items()},
    }
    messages = ("cut short", "unexpected: blocks.2", "missing: blocks.1", "another architecture")
    for (name, content), message in zip(broken.items(), messages):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(UserError, match=message):
            _vit(path)
    with pytest.raises(UserError, match="did you mean 'vit_base_patch14_reg4_dinov2'"):
        FrozenViT(GRID, "vit_base_patch14_reg4_dinov3", random_weights=True)
    with pytest.raises(UserError, match="no plain vision transformer"):
        FrozenViT(GRID, "resnet18", random_weights=True)
    with pytest.raises(UserError, match="colour"):
        FrozenViT(GRID, random_weights=True, model_options={"colour": 1})
    with pytest.raises(UserError, match="precision"):
        _vit(weights, precision="int4")


def test_missing_package(monkeypatch, weights):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"package timm: not installed.*fastasync\[imagenet\]"):
        _vit(weights)


def test_as_encoder_of_the_semantic_representation(images):
    settings = {"width": 16, "steps": 3, "batch": 4}
    item = build("semantic", (3, 64, 64), GRID, encoder=_vit(), channels=6, semvae=settings)
    item.fit(images, seed=0, progress=False)
    assert checked_encode(item, images).shape == (5, 6, GRID, GRID)


@pytest.fixture
def semvae(tmp_path):
    torch.manual_seed(2)
    vae = SemVAE(32, 6, GRID, 16, 1, 2).requires_grad_(False)
    path = tmp_path / "semvae.safetensors"
    save_semvae(path, vae, 16, 1, 2, {"vit": {"name": DINOV2_B, "fingerprint": _vit().fingerprint()}})
    return path


def _dino(semvae, **options):
    given = {"semvae": str(semvae), "random_weights": True, "model_options": TINY, "chunk": 2} | options
    return build("dino_semantic", (3, 64, 64), GRID, **given)


def test_dino_semantic(semvae, images):
    item = _dino(semvae)
    vae, facts = load_semvae(semvae)
    assert (item.channels, item.decodes, facts["width"]) == (6, False, 16)
    torch.testing.assert_close(checked_encode(item, images), vae.encode(_vit()(images)))
    assert checked_encode(item, images[:0]).shape == (0, 6, GRID, GRID)
    assert (
        item.fingerprint() == _dino(semvae, chunk=64).fingerprint() != _dino(semvae, precision="bfloat16").fingerprint()
    )


def test_dino_semantic_refuses_what_does_not_belong_together(semvae, weights, tmp_path):
    with pytest.raises(UserError, match=r"not given.*fastasync train-semvae"):
        _dino("")
    with pytest.raises(UserError, match=r"no such file.*fastasync train-semvae"):
        _dino(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match=r"fingerprint.*the SemVAE was trained on"):
        _dino(semvae, random_weights=False, vit_weights=str(weights))
    with pytest.raises(UserError, match="features of width 16"):
        _dino(semvae, model_options=TINY | {"embed_dim": 16})
    with pytest.raises(UserError, match="trained on a grid of 4"):
        build("dino_semantic", (3, 64, 64), 8, semvae=str(semvae), random_weights=True, model_options=TINY)
    facts = json.loads(semvae.with_suffix(".json").read_text())
    semvae.with_suffix(".json").write_text(json.dumps(facts | {"vit": {"name": "?", "fingerprint": None}}))
    with pytest.warns(UserWarning, match="unknown network"):
        _dino(semvae)
    semvae.with_suffix(".json").write_text(json.dumps(facts | {"width": 32}))
    with pytest.raises(UserError, match="does not describe"):
        load_semvae(semvae)
    semvae.with_suffix(".json").write_text("{")
    with pytest.raises(UserError, match="not readable"):
        load_semvae(semvae)
    semvae.with_suffix(".json").write_text(json.dumps(facts))
    data = bytearray(semvae.read_bytes())
    data[-5] ^= 1
    semvae.write_bytes(data)
    with pytest.raises(UserError, match="truncated or altered"):
        load_semvae(semvae)
