"""The PyTorch reference of every fused operation, and the counter-based generator that they share.

This module needs nothing but torch.  The Triton kernels beside it have the same function names and signatures; the
tests and the benchmarks compare the two, and the model and the objective run on either (one config field).

Conventions: B samples, N tokens, C channels, grid H x W, K representations whose channel counts are ``channels``
(``sum(channels) == C``, in the bundle's order).  All statistics are accumulated in float32 (float64 for float64 input).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LABEL_DROPOUT_STREAM = 2  # of the generator, as 0 is the noise
FP8, FP8_LARGEST = torch.float8_e4m3fn, 448.0
FP8_MULTIPLE = 16  # torch._scaled_mm refuses other sizes
_MASK = 0xFFFFFFFF
# Philox-4x32 multipliers and key increments (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


def philox(seed: int, counters: Sequence[Tensor], rounds: int = 10) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32: four int64 tensors of 32-bit counters (broadcastable) -> four int64 tensors of 32-bit words.

    ``seed`` is the 64-bit key.  Equal, bit for bit, to ``triton.language.philox`` and to Random123's known answers.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counters)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(rounds):
        # int64 products wrap modulo 2**64, so the arithmetic shift and the mask still give the right high word.
        product_a, product_b = c0 * _ROUND_A, c2 * _ROUND_B
        c0 = ((product_b >> 32) & _MASK) ^ c1 ^ k0
        c2 = ((product_a >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = product_b & _MASK, product_a & _MASK
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0, c1, c2, c3


def _words(seed: int, step: int | Tensor, samples: Tensor, count: int, stream: int) -> tuple[Tensor, ...]:
    """Counter = (element // 4, sample, step, stream): four words of shape [B, ceil(count / 4)].

    ``step``: an int, or an integer tensor on the device, so that a CUDA graph can be replayed at new steps: of one
    element, or [B, 1], one for each sample.
    """
    samples = samples.to(torch.int64)
    # the mask changes nothing, but hides that these are indices: torch.compile multiplies indices in int32
    blocks = torch.arange((count + 3) // 4, device=samples.device, dtype=torch.int64) & _MASK
    # fill_, not a fresh CPU tensor: no host-to-device copy, so this also runs inside a CUDA graph
    return philox(
        seed,
        (
            blocks[None, :],
            (samples & _MASK)[:, None],
            torch.zeros_like(blocks[None, :]) + (step & _MASK),
            torch.full_like(blocks[None, :], stream & _MASK),
        ),
    )


def _unit(word: Tensor) -> Tensor:
    """32-bit word -> float32 uniform in (0, 1): the middle of one of 2**23 equal cells, exact and never 0 or 1."""
    return ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23


def philox_uniform(seed: int, step: int | Tensor, samples: Tensor, count: int, stream: int = 0) -> Tensor:
    """Uniform numbers in (0, 1), float32 [B, count], a pure function of (seed, step, sample, element, stream).

    ``samples``: integer [B], each in [0, 2**32).  Element e is word ``e % 4`` of counter block ``e // 4``.
    """
    words = torch.stack([_unit(word) for word in _words(seed, step, samples, count, stream)], dim=-1)
    return words.flatten(1)[:, :count]


def philox_normal(seed: int, step: int | Tensor, samples: Tensor, count: int, stream: int = 0) -> Tensor:
    """Standard normal numbers, float32 [B, count], a pure function of (seed, step, sample, element, stream).

    Words (0, 1) and (2, 3) of a block each give one Box-Muller pair (cosine first).
    """
    words = [_unit(word) for word in _words(seed, step, samples, count, stream)]
    pairs = []
    for radius_word, angle_word in ((words[0], words[1]), (words[2], words[3])):
        radius = torch.sqrt(-2.0 * torch.log(radius_word))
        angle = (2.0 * math.pi) * angle_word
        pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(pairs, dim=-1).flatten(1)[:, :count]


def drop_labels(y: Tensor, null_class: int, rate: float, seed: int, step: int | Tensor, samples: Tensor) -> Tensor:
    """Replace each label by ``null_class`` with probability ``rate``: a pure function of (seed, step, sample).

    y [B] int64; samples [B] integer in [0, 2**32), so any split of the batch drops the same labels.
    """
    uniform = philox_uniform(seed, step, samples, 1, stream=LABEL_DROPOUT_STREAM)[:, 0]
    return torch.where(uniform < rate, null_class, y)


def per_channel(values: Tensor, channels: Sequence[int]) -> Tensor:
    """[B, K] values of the representations -> [B, C, 1, 1], each repeated over its channels."""
    columns = [values[:, k : k + 1].expand(-1, count) for k, count in enumerate(channels)]
    return torch.cat(columns, dim=1)[:, :, None, None]


def draw_noise(z: Tensor, seed: int, step: int | Tensor, samples: Tensor) -> Tensor:
    """The noise eps of a batch, float32 (float64 for float64 z), in the shape of z [B, C, H, W]."""
    noise = philox_normal(seed, step, samples, z[0].numel() if z.shape[0] else 0, stream=0)
    return noise.reshape(z.shape).to(torch.promote_types(z.dtype, torch.float32))


def noising(
    z: Tensor,
    tau: Tensor,
    channels: Sequence[int],
    seed: int,
    step: int | Tensor,
    samples: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Noised state ``x_k = (1 - tau_k) eps_k + tau_k z_k`` [B, C, H, W] in ``dtype`` (default: z's).

    z [B, C, H, W]; tau [B, K] in [0, 1] (0 is noise, 1 is data); samples [B] integer.  Differentiable in tau:
    ``dL/dtau_k = sum over representation k of dL/dx (z - eps)``.
    """
    eps = draw_noise(z, seed, step, samples)
    weight = per_channel(tau.to(eps.dtype), channels)
    return ((1.0 - weight) * eps + weight * z.to(eps.dtype)).to(dtype or z.dtype)


def flow_errors(
    v: Tensor, z: Tensor, channels: Sequence[int], seed: int, step: int | Tensor, samples: Tensor, cosine: bool = False
) -> tuple[Tensor, Tensor]:
    """Squared errors of the velocity, against the target ``u = z - eps`` with the noise drawn again, not stored.

    v, z [B, C, H, W].  Returns ``errors`` [B, K], ``||v_k - u_k||^2 / d_k`` with d_k = channels[k] * H * W, and
    ``cosines`` [B], the mean over positions of ``1 - cos(v, u)`` over all C channels (zeros when ``cosine`` is false).
    Both float32 (float64 for float64 input), differentiable in v.
    """
    eps = draw_noise(z, seed, step, samples)
    target = z.to(eps.dtype) - eps
    v = v.to(eps.dtype)
    difference = (v - target).square()
    parts = [part.flatten(1).mean(1) for part in difference.split(list(channels), dim=1)]
    if cosine:
        cosines = (1.0 - torch.nn.functional.cosine_similarity(v, target, dim=1)).flatten(1).mean(1)
    else:
        cosines = torch.zeros(v.shape[0], device=v.device, dtype=eps.dtype)
    return torch.stack(parts, dim=1), cosines


def corrected_loss(
    v: Tensor,
    z: Tensor,
    weight: Tensor,
    channels: Sequence[int],
    seed: int,
    step: int | Tensor,
    samples: Tensor,
    cosine_weight: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scalar ``loss = mean_b (sum_k weight_bk errors_bk + cosine_weight cosines_b)``, errors [B, K] and cosines [B].

    Arguments as in ``flow_errors``; weight [B, K].  The loss is differentiable in v and weight; errors and cosines
    carry no gradient, and the cosines are zeros when ``cosine_weight`` is zero.  An empty batch has loss 0.
    """
    errors, cosines = flow_errors(v, z, channels, seed, step, samples, cosine=cosine_weight != 0)
    loss = ((weight * errors).sum() + cosine_weight * cosines.sum()) / max(v.shape[0], 1)
    return loss, errors.detach(), cosines.detach()


def rmsnorm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last axis, statistics in float32: ``x / sqrt(mean(x^2) + eps) * weight``, in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed.to(x.dtype) * weight.to(x.dtype)).to(x.dtype)


def rmsnorm_modulate(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """adaLN: ``rmsnorm(x) (1 + scale) + shift``.  x [B, N, D], weight [D], shift and scale [B, D] -> [B, N, D]."""
    return rmsnorm(x, weight, eps) * (1 + scale[:, None]) + shift[:, None]


def gated_rmsnorm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The end of one half-block, the start of the next: ``x' = x + gate y``; ``h = rmsnorm(x') (1 + scale) + shift``.

    x, y [B, N, D]; gate, shift, scale [B, D]; weight [D].  Returns (x', h), both [B, N, D].
    ``bias`` [D]: its gradient, the sum of dy over samples and tokens, is returned, its values are not read: pass it
    when the linear that made y used ``bias.detach()``.
    """
    if bias is not None:
        y = y - (bias.detach() - bias).to(y.dtype)  # minus +0: the same bits, -0 too
    residual = x + gate[:, None] * y
    return residual, rmsnorm_modulate(residual, weight, shift, scale, eps)


def rotate_pairs(x: Tensor) -> Tensor:
    """Interleaved pairs over the last axis: (a, b) -> (-b, a)."""
    pairs = x.unflatten(-1, (-1, 2))
    return torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)


def qknorm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float = 1e-6,
    *,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed qkv [B, N, 3 * heads * Dh] (order q, k, v; then heads; then Dh) -> q, k, v as [B, heads, N, Dh].

    q and k get an RMSNorm over each head (weights [Dh]) and then RoPE with the tables cos, sin [N, Dh] (float32,
    interleaved pairs); v is passed through.  ``bias`` [3 * heads * Dh]: its gradient, the sum of dqkv over samples and
    tokens, is returned, its values are not read: pass it when the linear that made qkv used ``bias.detach()``.
    """
    if bias is not None:
        qkv = qkv - (bias.detach() - bias).to(qkv.dtype)  # minus +0: the same bits, -0 too
    batch, tokens, width = qkv.shape
    q, k, v = qkv.reshape(batch, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    out = []
    for part, weight in ((q, q_weight), (k, k_weight)):
        normed = rmsnorm(part, weight, eps)
        wide = normed.to(torch.promote_types(normed.dtype, torch.float32))
        out.append((wide * cos + rotate_pairs(wide) * sin).to(qkv.dtype))
    return out[0], out[1], v


def swiglu(packed: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """``silu(a) * b`` with [a, b] the two halves of the last axis: [..., 2 F] -> [..., F].

    bias: [2 F] of the linear that made packed.  It gets the gradient that adding it would give; its values are not
    used: pass it when the linear used ``bias.detach()``.
    """
    if bias is not None:
        packed = packed + (bias - bias.detach()).to(packed.dtype)
    a, b = packed.chunk(2, dim=-1)
    return torch.nn.functional.silu(a) * b


def guided_update(
    x: Tensor, v: Tensor, v_weak: Tensor | None, scale: Tensor | None, dtau: Tensor, channels: Sequence[int]
) -> Tensor:
    """One increment of the sampler with guidance: ``x_k + dtau_k (v_weak + scale_k (v - v_weak))_k``.

    x, v, v_weak [B, C, H, W]; scale and dtau [B, K].  Without ``v_weak`` the scale is not used (unguided).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    velocity = v.to(wide)
    if v_weak is not None:
        if scale is None:
            raise ValueError("v_weak needs a scale [B, K]")
        base = v_weak.to(wide)
        velocity = base + per_channel(scale.to(wide), channels) * (velocity - base)
    return (x.to(wide) + per_channel(dtau.to(wide), channels) * velocity).to(x.dtype)


def cast_rows(x: Tensor, tops: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of x [M, C] in fp8: (e4m3 [M, C], what they were divided by, float32 [M, 1], with ``tops`` the largest
    magnitude of each column, float32 [C], otherwise empty).  A row of zeros stays zeros.
    """
    wide = x.float()
    scale, inverse = _fp8_scale(wide.abs().amax(1, keepdim=True))
    top = wide.abs().amax(0) if tops else wide.new_empty(0)
    return (wide * inverse).clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8), scale, top


def cast_columns(x: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of x [M, C] as rows in fp8: (e4m3 [C, M up to a multiple of 16, zeros last], float32 [C, 1]).

    ``top``: of the same x, from ``cast_rows``.
    """
    scale, inverse = _fp8_scale(top)
    cast = (x.float() * inverse).clamp(-FP8_LARGEST, FP8_LARGEST)
    padded = torch.nn.functional.pad(cast, (0, 0, 0, -len(x) % FP8_MULTIPLE))
    return padded.t().contiguous().to(FP8), scale[:, None]


def _fp8_scale(top: Tensor) -> tuple[Tensor, Tensor]:
    scale = top.clamp(min=1e-12) * (1 / FP8_LARGEST)
    return scale, 1.0 / scale
