"""Texture latent of a convolutional KL autoencoder (Rombach et al., "Latent diffusion", 2022), run by diffusers.

Reads weights in the layout of the latent-diffusion code, such as ``ldm-imagenet256-f16d32-50ep.ckpt``, and in
diffusers' own.  The architecture is read off the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from fastasync_kernels.reference import philox, philox_normal
from torch import Tensor, nn

from fastasync.errors import UserError
from fastasync.files import digest_tensors
from fastasync.representations.base import ImageShape, Representation, register
from fastasync.representations.texture import to_float, to_uint8
from fastasync.representations.weights import (
    PRECISIONS,
    autocast,
    check_precision,
    import_model_package,
    load_exactly,
    read_weights,
)

SAMPLE_STREAM = 8  # Philox stream of the posterior's samples
NORM_GROUPS = 32  # fixed in the latent-diffusion code; not to be seen in the weights
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_FIELD = "representation autoencoder: weights"
_REMEDY = "give an LDM-style AutoencoderKL, such as ldm-imagenet256-f16d32-50ep.ckpt (hustvl's VA-VAE variants)"
# diffusers' names -> the latent-diffusion code's.  Its decoder counts levels from the finest, diffusers' from the
# coarsest: see ldm_name.
_NAMES = (
    (r"\.(down|up)_blocks\.", r".\1."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)


def ldm_name(name: str, levels: int) -> str:
    """The latent-diffusion code's name of a diffusers AutoencoderKL parameter; ``levels`` = len(block_out_channels)."""
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"^decoder\.up\.(\d+)", lambda found: f"decoder.up.{levels - 1 - int(found[1])}", name)


def ldm_state(model: nn.Module) -> dict[str, Tensor]:
    """A diffusers AutoencoderKL's weights in the latent-diffusion layout (attention as 1x1 convolutions)."""
    return _to_ldm(model.state_dict())


def _to_ldm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    levels = _count(state, "encoder.down_blocks")
    renamed = {ldm_name(name, levels): value for name, value in state.items()}
    linear = {name for name, value in renamed.items() if value.ndim == 2}
    return {name: value[:, :, None, None] if name in linear else value for name, value in renamed.items()}


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """1 + the largest N in names ``prefix.N.``; 0 if there are none."""
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    return max((1 + int(found[1]) for found in map(pattern.match, state) if found), default=0)


def architecture(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of diffusers' AutoencoderKL for weights in the latent-diffusion layout.

    KeyError or IndexError when a tensor that says it is missing.
    """
    levels = _count(state, "encoder.down")
    attention = [_count(state, f"encoder.down.{level}.attn") > 0 for level in range(levels)]
    widths = [state[f"encoder.down.{level}.block.0.conv2.weight"].shape[0] for level in range(levels)]
    return {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "block_out_channels": tuple(widths),
        "down_block_types": tuple("AttnDownEncoderBlock2D" if here else "DownEncoderBlock2D" for here in attention),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if here else "UpDecoderBlock2D" for here in attention[::-1]),
        "layers_per_block": _count(state, "encoder.down.0.block"),
        "latent_channels": state["post_quant_conv.weight"].shape[1],
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in state,
        "norm_num_groups": NORM_GROUPS,
    }


def load_autoencoder(path: str) -> Any:
    """diffusers' AutoencoderKL with the weights of a file, float32, on the CPU.

    Entries of other parts (``loss.*`` and what was trained beside it) are left out.  UserError when the file is
    missing, cut short, or of another architecture, or diffusers is not installed.
    """
    kind = import_model_package("diffusers").AutoencoderKL
    state = {name: value for name, value in read_weights(path, _FIELD, _REMEDY).items() if name.startswith(_PARTS)}
    if _count(state, "encoder.down_blocks"):
        state = _to_ldm(state)
    try:
        settings = architecture(state)
        with torch.device("meta"):
            model = kind(**settings)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(_FIELD, path, f"weights of another architecture ({error}): {_REMEDY}") from None
    converted = {}
    for name, value in model.state_dict().items():
        source = ldm_name(name, len(settings["block_out_channels"]))
        if source in state:
            found = state.pop(source)
            converted[name] = found.flatten(1) if value.ndim == 2 and found.shape[2:] == (1, 1) else found
    load_exactly(model, converted | state, _FIELD, path, _REMEDY)  # what is left in ``state`` is unexpected
    return model.requires_grad_(False).eval()


def image_keys(images: Tensor) -> Tensor:
    """A number in [0, 2^32) from the pixels of each image uint8 [N, C, H, W]: int64 [N], exact on any device.

    The sum of the pixels, each times a fixed random 32-bit number, modulo 2^32.
    """
    pixels = images.flatten(1).long()
    place = torch.arange(pixels.shape[1], device=images.device)
    zero = torch.zeros_like(place)
    return (pixels * philox(0, (place, zero, zero, zero + SAMPLE_STREAM))[0]).sum(1) & 0xFFFFFFFF


@register("autoencoder")
class Autoencoder(Representation):
    """Images [N, 3, S, S] <-> latents [N, channels, grid, grid] of a frozen AutoencoderKL, S = grid * 2^(levels - 1).

    Options: ``weights`` (a file); ``sample``: a sample of the posterior instead of its mean, drawn by Philox from
    ``seed`` and the image's pixels, so the same in whatever batch, shard or rank; ``precision`` float32 or bfloat16;
    ``chunk``: images at a time.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        grid: int,
        weights: str = "",
        sample: bool = False,
        seed: int = 0,
        precision: str = "float32",
        chunk: int = 32,
    ):
        super().__init__(image_shape, grid)
        check_precision("representation autoencoder", precision)
        if chunk < 1:
            raise UserError("representation autoencoder: chunk", chunk, "must be at least 1")
        self.vae = load_autoencoder(weights)
        self.sample, self.seed, self.precision, self.chunk = sample, seed, precision, chunk
        config = self.vae.config
        self.channels = int(config["latent_channels"])
        side = grid * 2 ** (len(config["block_out_channels"]) - 1)
        wanted = (config["in_channels"], side, side)
        if tuple(image_shape) != wanted:
            found = "x".join(map(str, image_shape))
            remedy = f"these weights make a {grid}x{grid} grid of {'x'.join(map(str, wanted))} images"
            raise UserError("representation autoencoder: images", found, remedy)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images uint8 [N, 3, S, S] -> float32 [N, channels, grid, grid]."""
        shape = (self.channels, self.grid, self.grid)
        parts = [torch.zeros(0, *shape, device=images.device)]
        for part in images.split(self.chunk) if len(images) else ():  # diffusers' attention refuses an empty batch
            mean, std = self._posterior(part)
            if self.sample:
                noise = philox_normal(self.seed, 0, image_keys(part), mean[0].numel(), stream=SAMPLE_STREAM)
                mean = mean + std * noise.view_as(mean)
            parts.append(mean)
        return torch.cat(parts)

    def _posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(images.device, self.precision):
            posterior = self.vae.encode(to_float(images)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        parts = [torch.zeros(0, *self.image_shape, dtype=torch.uint8, device=latents.device)]
        for part in latents.split(self.chunk) if len(latents) else ():
            with autocast(latents.device, self.precision):
                parts.append(to_uint8(self.vae.decode(part).sample.float()))
        return torch.cat(parts)

    def fingerprint(self) -> str:
        """SHA-256 of the weights and of what else changes the latents; not of where the file is."""
        return self._fingerprint(self.seed if self.sample else None, self.precision)

    def _fingerprint(self, sampled: int | None, precision: str) -> str:
        return digest_tensors(self.state_dict(), self.name, self.version, self.grid, sampled, precision)

    def fits(self, fingerprint: str) -> bool:
        """Whether these weights made the latents: means or samples (of this seed), in any precision."""
        ways = ((sampled, precision) for precision in PRECISIONS for sampled in (None, self.seed))
        return any(self._fingerprint(*way) == fingerprint for way in ways)
