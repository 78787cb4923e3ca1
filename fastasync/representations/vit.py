"""Features of a frozen vision transformer (DINOv2 by default), and the semantic latent made of them by a SemVAE.

One class serves three uses: the encoder behind the semantic latent, features to cache for REPA, and REPA features in
the training step (``vit(images)`` on images that were decoded for it).
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from fastasync.errors import UserError, unknown_name
from fastasync.files import digest_tensors
from fastasync.representations.base import ImageShape, Representation, register
from fastasync.representations.semvae_file import load_semvae
from fastasync.representations.texture import to_float
from fastasync.representations.weights import (
    autocast,
    check_precision,
    import_model_package,
    load_exactly,
    read_weights,
)

DINOV2_B = "vit_base_patch14_reg4_dinov2"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_REMEDY = "give the network's own weights file, such as dinov2_vitb14_reg4_pretrain.pth of facebookresearch/dinov2"


class FrozenViT(nn.Module):
    """Images -> the patch tokens after the last norm, as a map [N, D, grid, grid]; never trained.

    Images are resized to grid x patch (256 to 224 for DINOv2's patch of 14 and a grid of 16) by bicubic interpolation
    without antialiasing, as REPA does it, and normalised by ImageNet's mean and std.  Class and register tokens are
    left out.  Position embeddings are resampled to the grid.

    Args:
        grid: side of the token grid.
        name: a timm model, or with ``hub`` an entry of that repository.
        weights: a local file, in timm's or the authors' layout.
        hub: folder of a torch.hub repository (its ``hubconf.py`` is run); "" for timm.
        precision: float32, or bfloat16 (the features are float32 all the same).
        chunk: images at a time.
        random_weights: random weights instead of a file, always the same ones: for tests and dry runs.
        model_options: further arguments of the model.

    Raises UserError: an unknown model, one that is no vision transformer, or weights missing or of another one.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        grid: int,
        name: str = DINOV2_B,
        weights: str = "",
        hub: str = "",
        precision: str = "float32",
        chunk: int = 64,
        random_weights: bool = False,
        model_options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        check_precision("vit", precision)
        for field, value in (("grid", grid), ("chunk", chunk)):
            if value < 1:
                raise UserError(f"vit {field}", value, "must be at least 1")
        self.grid, self.name, self.hub, self.precision, self.chunk = grid, name, hub, precision, chunk
        self.random_weights = random_weights
        state = None if random_weights else read_weights(weights, f"weights of {name}", _REMEDY)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            make = _from_hub if hub else _from_timm
            network = make(name, dict(model_options or {}), hub)
        try:
            patch = getattr(network, "patch_size", None) or network.patch_embed.patch_size
            self.patch = patch if isinstance(patch, int) else int(patch[0])
            self.map_channels = int(getattr(network, "num_features", None) or network.embed_dim)
        except (AttributeError, TypeError):
            raise UserError("vit", name, "is no vision transformer: choose one with patch tokens") from None
        if state is not None:
            if not hub:
                state = _timm_layout(state, network, name)
            load_exactly(network, state, f"weights of {name}", weights, _REMEDY)
        if not hub:
            network.set_input_size(img_size=grid * self.patch)  # resamples the position embeddings
        self.network = network.requires_grad_(False).eval()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> FrozenViT:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images uint8 [N, 3, S, S] -> float32 [N, D, grid, grid], on the network's device."""
        return self.feature_map(to_float(images.to(self.mean.device)))

    @torch.no_grad()
    def feature_map(self, x: Tensor) -> Tensor:
        """Images float32 [N, 3, S, S] in [-1, 1] -> float32 [N, D, grid, grid]."""
        return torch.cat([self._chunk(part) for part in x.split(self.chunk)])

    def _chunk(self, x: Tensor) -> Tensor:
        side = self.grid * self.patch
        x = ((x + 1) / 2 - self.mean) / self.std
        if x.shape[-2:] != (side, side):
            x = interpolate(x, (side, side), mode="bicubic", align_corners=False)
        with autocast(x.device, self.precision):
            tokens = self.network.forward_features(x)
        if isinstance(tokens, Mapping):  # the authors' DINOv2
            tokens = tokens.get("x_norm_patchtokens")
        count = self.grid**2
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[1] < count:
            raise UserError("vit", self.name, f"gives no {count} patch tokens: choose a plain vision transformer")
        return tokens[:, -count:].float().transpose(1, 2).unflatten(2, (self.grid, self.grid))

    def fingerprint(self) -> str:
        """SHA-256 of the weights, the grid and the preprocessing; not of precision, nor of where the file is."""
        return digest_tensors(self.network.state_dict(), "vit, bicubic", self.grid, IMAGENET_MEAN, IMAGENET_STD)


class TokenFeatures:
    """A ViT's features as REPA's targets, to cache (``fastasync encode``) or to make in the training step.

    ``shape``: (tokens, width).  Called with images uint8 [N, 3, S, S]: float32 [N, grid * grid, D], row by row.
    """

    def __init__(self, vit: FrozenViT):
        self.vit, self.shape = vit, (vit.grid**2, vit.map_channels)

    def __call__(self, images: Tensor) -> Tensor:
        return self.vit(images).flatten(2).transpose(1, 2)

    def fingerprint(self) -> str:
        """The ViT's: a SemVAE trained on cached features recognises the network by it."""
        return self.vit.fingerprint()


def _from_timm(name: str, options: dict[str, Any], hub: str) -> Any:
    timm = import_model_package("timm")
    if name.partition(".")[0] not in timm.list_models():
        raise unknown_name("vit", name, timm.list_models("vit_*"))
    try:
        network = timm.create_model(name, pretrained=False, num_classes=0, **options)
    except TypeError as error:
        raise UserError(f"vit {name}: options", options, str(error)) from None
    if not hasattr(network, "set_input_size") or not hasattr(network, "num_prefix_tokens"):
        raise UserError(
            "vit", name, "is no plain vision transformer: choose one with patch tokens, such as " + DINOV2_B
        )
    return network


def _from_hub(name: str, options: dict[str, Any], hub: str) -> Any:
    if not (Path(hub) / "hubconf.py").is_file():
        raise UserError("vit hub", hub, "no hubconf.py in it: give the folder of a torch.hub repository")
    try:
        return torch.hub.load(hub, name, source="local", pretrained=False, **options)
    except Exception as error:  # whatever that repository raises
        raise UserError(f"vit hub {hub}", name, f"{type(error).__name__}: {error}") from error


def _timm_layout(state: Mapping[str, Tensor], network: Any, name: str) -> dict[str, Tensor]:
    """The weights under timm's names (its own conversion of the authors' layouts), without a classifier."""
    convert = getattr(importlib.import_module(type(network).__module__), "checkpoint_filter_fn", None)
    try:
        converted = convert(dict(state), network) if convert else dict(state)
    except (KeyError, RuntimeError, ValueError, AttributeError) as error:
        raise UserError(f"weights of {name}", type(error).__name__, f"of another architecture ({error})") from None
    return {key: value for key, value in converted.items() if not key.startswith(("head.", "head_dist."))}


@register("dino_semantic")
class DinoSemantic(Representation):
    """Frozen ViT features -> posterior mean of a trained SemVAE, [N, channels, grid, grid].

    Options: ``semvae``, a file of ``fastasync train-semvae``; ``vit_weights`` and the other arguments of FrozenViT:
    ``vit`` (its name), ``hub``, ``precision``, ``chunk``, ``random_weights``, ``model_options``.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        grid: int,
        semvae: str = "",
        vit: str = DINOV2_B,
        vit_weights: str = "",
        hub: str = "",
        precision: str = "float32",
        chunk: int = 64,
        random_weights: bool = False,
        model_options: dict[str, Any] | None = None,
    ):
        super().__init__(image_shape, grid)
        if image_shape[0] != 3:
            raise UserError("representation dino_semantic: images", f"{image_shape[0]} channels", "must be RGB images")
        self.vae, facts = load_semvae(semvae)  # the smaller file first
        if self.vae.grid != grid:
            raise UserError("grid", grid, f"the SemVAE {semvae} was trained on a grid of {self.vae.grid}")
        self.vit = FrozenViT(grid, vit, vit_weights, hub, precision, chunk, random_weights, model_options)
        if self.vit.map_channels != self.vae.feature_dim:
            found = f"features of width {self.vit.map_channels}"
            raise UserError("vit", vit, f"has {found}; the SemVAE {semvae} was trained on {self.vae.feature_dim}")
        expected = facts["vit"]["fingerprint"]
        if expected is None:
            warnings.warn(f"{semvae}: trained on cached features of an unknown network; not compared", stacklevel=2)
        elif expected != self.vit.fingerprint():
            what = f"fingerprint {self.vit.fingerprint()[:12]}, the SemVAE was trained on {expected[:12]}"
            raise UserError(f"weights of {vit}", what, "use the weights that it was trained on, or train it again")
        self.channels = self.vae.channels

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        parts = images.split(self.vit.chunk)  # the features are wide: never all at once
        return torch.cat([self.vae.encode(self.vit(part)) for part in parts])

    def fingerprint(self) -> str:
        """SHA-256 of both networks' weights and of what else changes the latents; not of where the files are."""
        return digest_tensors(self.state_dict(), self.name, self.version, self.grid, self.vit.precision)
