"""LightningDiT with one noising time per representation: the velocity network v(x, tau, y).

State-dict names and numerics are those of LightningDiT and SFD, so that their published checkpoints load strictly.  The
blocks are written for fused operations: a block hands on its last branch without adding it, and the next norm (the next
block's, or the final layer's) adds it in the same pass over memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import fastasync_kernels
import torch
from fastasync_kernels import attention as kernels_attention
from fastasync_kernels import gated_mlp
from fastasync_kernels.fp8_linear import (
    ADALN_PARTS,
    QKNORM_PARTS,
    fp8_linear_hinted,
    fp8_mlp_hinted,
    unhinted,
)
from fastasync_kernels.zeros import fast_width, hidden_zeros
from torch import Tensor, nn

from fastasync.errors import UserError
from fastasync.model.embeddings import (
    LabelEmbedding,
    PatchEmbedding,
    RotaryTables,
    TimeEmbedding,
    position_table,
    rope_tables,
    short_name,
    unpatchify,
)
from fastasync.model.linears import BlockLinear, Linear
from fastasync.model.recompute import RECOMPUTE, recomputed

REPA_HIDDEN = 2048
KERNELS = ("reference", "triton", "auto")
ATTENTION = ("auto", *kernels_attention.BACKENDS)
MLP = ("auto", *gated_mlp.BACKENDS)


class Size(NamedTuple):
    depth: int
    width: int
    heads: int


SIZES = {
    "S": Size(12, 384, 6),
    "B": Size(12, 768, 12),
    "L": Size(24, 1024, 16),
    "XL": Size(28, 1152, 16),
    "1p0B": Size(24, 1536, 24),
    "1p6B": Size(28, 1792, 28),
}


class Ops(NamedTuple):
    """The fused operations that the network uses; signatures in ``fastasync_kernels.reference``.

    Functions, not the module that holds them: a model must survive ``copy.deepcopy`` and pickling.  ``attention`` and
    ``mlp`` are names of backends: chosen outside of torch.compile, constant inside.
    """

    rmsnorm_modulate: Callable[..., Any]
    gated_rmsnorm_modulate: Callable[..., Any]
    qknorm_rope: Callable[..., Any]
    swiglu: Callable[..., Any]
    rmsnorm_modulate_tops: Callable[..., Any] | None  # the two for linears in fp8 (fastasync_kernels.tops): the
    gated_rmsnorm_modulate_tops: Callable[..., Any] | None  # reference has none
    sum_bias: bool  # whether they give the gradients of the biases added before them, at almost no cost
    attention: str
    mlp: str


def select_ops(kernels: str, device: torch.device, attention: str = "sdpa", mlp: str = "plain") -> Ops:
    """The implementation of the fused operations for a device; ``kernels`` is one of ``KERNELS``.

    Raises a UserError where it cannot run there.
    """
    kind = "reference" if device.type == "meta" else kernels  # the meta device computes shapes only
    try:
        chosen = fastasync_kernels.select(kind, device)
    except fastasync_kernels.KernelUnavailable as error:
        raise UserError("model.kernels", kernels, str(error)) from error
    functions: dict[str, Any] = {name: getattr(chosen, name, None) for name in Ops._fields[:-3]}
    return Ops(**functions, sum_bias=chosen.__name__.endswith("triton_ops"), attention=attention, mlp=mlp)


class RMSNorm(nn.Module):
    """The weight [width] of an RMSNorm; the fused operations compute it together with their neighbours."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


def hinted(linear: nn.Linear, ops: Ops) -> bool:
    """Whether a linear takes largest magnitudes of its input, and gives a hint (fastasync_kernels.tops): in fp8, by the
    kernels, in training."""
    kernels = ops.gated_rmsnorm_modulate_tops is not None and getattr(linear, "fp8", None) == "triton"
    return kernels and torch.is_grad_enabled() and linear.weight.requires_grad


def project(
    linear: nn.Linear, x: Tensor, ops: Ops, parts: int = 0, tops: Any = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``linear(x)``, its bias if the next fused operation is to return the bias's gradient, and its hint (or None).

    A bias's gradient is a sum over all rows: PyTorch reads the whole tensor again for it, a kernel that writes the
    tensor does not, and the cast of a ``hinted`` linear does not either.  ``parts``: that the next operation gives for
    a row, 0 if it takes no hint; ``tops``: x's largest magnitudes, if known.
    """
    if parts and hinted(linear, ops):
        y, hint = fp8_linear_hinted(x, linear.weight, linear.bias, tops, parts)
        return y, None, hint
    if ops.sum_bias and isinstance(linear, Linear) and torch.is_grad_enabled():
        return linear(x, detach_bias=True), linear.zeros.beside(linear.bias), None
    return linear(x), None, None


def modulated(
    ops: Ops,
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    hint: Tensor | None,
    norm: tuple[Tensor, Tensor, Tensor],
    tops: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Any]:
    """``x + gate y`` (x where there is no y), the same normed and modulated, and with ``tops`` the latter's largest
    magnitudes, otherwise None.

    norm: its weight [width], shift and scale [B, width]; bias and hint: what ``project`` gave with y.
    """
    if y is None:
        if tops and ops.rmsnorm_modulate_tops is not None:
            return x, *ops.rmsnorm_modulate_tops(x, *norm)
        return x, ops.rmsnorm_modulate(x, *norm), None
    if ops.gated_rmsnorm_modulate_tops is not None and (tops or hint is not None) and bias is None:
        return ops.gated_rmsnorm_modulate_tops(x, y, gate, *norm, hint=hint, tops=tops)
    return *ops.gated_rmsnorm_modulate(x, y, gate, *norm, bias=bias), None


class SelfAttention(nn.Module):
    """Multi-head attention with QK-norm over each head and RoPE: h [B, N, width] -> [B, N, width], and its last bias
    and hint (see ``project``)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)
        self.proj = Linear(width, width)

    def forward(
        self, h: Tensor, cos: Tensor, sin: Tensor, ops: Ops, tops: Any = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        # q, k and v lie in memory as [B, N, heads, Dh]: every fused backend reads that and writes the same, no copies
        packed, bias, hint = project(self.qkv, h, ops, QKNORM_PARTS, tops)
        weights = self.q_norm.weight, self.k_norm.weight
        given = {"bias": bias} if hint is None else {"hint": hint}
        q, k, v = ops.qknorm_rope(packed, *weights, cos, sin, self.heads, **given)
        mixed = kernels_attention.attention(q, k, v, ops.attention).transpose(1, 2).flatten(2)
        return project(self.proj, mixed, ops, ADALN_PARTS)


def hidden_width(width: int, multiple: int = 1) -> int:
    """Hidden width of the MLP: 8/3 of the width, rounded down as the peers do, then up to a multiple."""
    return -(-int(2 / 3 * 4 * width) // multiple) * multiple


class SwiGLU(nn.Module):
    """Gated MLP ``w3(silu(a) b)`` with [a, b] = w12(h): [B, N, width] -> [B, N, width], and its hint or None.

    ``frozen``: its parameters as products take them, see ``freeze``; ``units``: hidden units of zeros in its products,
    see ``widen``.
    """

    frozen: gated_mlp.FrozenMlp | None = None
    units: int = 0

    def __init__(self, width: int, multiple: int = 1):
        super().__init__()
        hidden = hidden_width(width, multiple)
        self.w12 = Linear(width, 2 * hidden)
        self.w3 = BlockLinear(hidden, width)

    def hinted(self, ops: Ops) -> bool:
        return hinted(self.w12, ops) and hinted(self.w3, ops)

    @property
    def parameters_in_order(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.w12.weight, self.w12.bias, self.w3.weight, self.w3.bias

    def widen(self, units: int) -> None:
        """Compute products with ``units`` hidden units of zeros besides: the same results and parameters."""
        self.units, (self.w12.zeros, self.w3.zeros) = units, hidden_zeros(units)

    def freeze(self, dtype: torch.dtype, backend: str) -> None:
        """For passes without gradients by ``backend`` in ``dtype``: the parameters, on their device, change no more.

        Where they do all the same, they are read again, except in what torch.compile has compiled.
        """
        self.frozen = gated_mlp.freeze_mlp(*self.parameters_in_order, dtype, backend, self.units)

    def _held(self, h: Tensor, backend: str) -> gated_mlp.FrozenMlp | None:
        """The frozen parameters for ``backend``, if they are still the parameters."""
        frozen = self.frozen
        if frozen is None or torch.is_grad_enabled() or (h.dtype, backend) != (frozen.w12.dtype, frozen.backend):
            return None
        return frozen if torch.compiler.is_compiling() or frozen.stands_for(*self.parameters_in_order) else None

    def forward(self, h: Tensor, ops: Ops, tops: Any = None) -> tuple[Tensor, Tensor | None]:
        weights = self.parameters_in_order
        if self.hinted(ops):
            return fp8_mlp_hinted(h, *weights, tops, ADALN_PARTS, self.units)
        if self.w12.fp8 is self.w3.fp8 is None:
            if (frozen := self._held(h, ops.mlp)) is not None:
                return gated_mlp.frozen_mlp(h, frozen, ops.swiglu), None
            if ops.mlp == "quack" and h.dtype == torch.bfloat16:
                parts = (self.w12.parts, self.w3.parts) if torch.is_grad_enabled() else (1, 1)
                return gated_mlp.gated_mlp(h, *weights, parts, self.units), None
        packed, bias, _ = project(self.w12, h, ops)
        return self.w3(ops.swiglu(packed, bias=bias)), None


class Block(nn.Module):
    """adaLN transformer block.  It carries (x, y, gate, hint), of which the first three stand for the residual stream
    ``x + gate y``, and the hint is what y's linear gave besides y in fp8 (``project``), otherwise None.

    Inputs: x [B, N, width]; y and gate ([B, N, width], [B, width]) the previous block's last branch, or both None, and
    its hint; condition [B, width]; RoPE tables cos, sin [N, Dh].  Returns the same four for the next block.
    ``recompute`` says what the backward pass computes again (fastasync.model.recompute).
    """

    def __init__(self, width: int, heads: int, mlp_multiple: int = 1):
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = SelfAttention(width, heads)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, mlp_multiple)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.recompute = "none"

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.compute(*inputs)
        return recomputed(self.recompute, self.compute, *inputs)

    def compute(
        self,
        x: Tensor,
        y: Tensor | None,
        gate: Tensor | None,
        hint: Tensor | None,
        condition: Tensor,
        cos: Tensor,
        sin: Tensor,
        ops: Ops,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=1)
        norm1, norm2 = (self.norm1.weight, shift1, scale1), (self.norm2.weight, shift2, scale2)
        x, h, tops = modulated(ops, x, y, gate, hint, norm1, hinted(self.attn.qkv, ops))
        y, bias, hint = self.attn(h, cos, sin, ops, tops)
        x, h, tops = modulated(ops, x, y, gate1, hint, norm2, self.mlp.hinted(ops), bias)
        y, hint = self.mlp(h, ops, tops)
        return x, y, gate2, hint


class FinalLayer(nn.Module):
    """Ends the last block and maps tokens to latent pixels: [B, N, width] -> [B, N, patch * patch * channels]."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, y: Tensor, gate: Tensor, hint: Tensor | None, condition: Tensor, ops: Ops) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        return self.linear(modulated(ops, x, y, gate, hint, (self.norm_final.weight, shift, scale), tops=False)[1])


class LightningDiT(nn.Module):
    """Velocity network of K representations that share one token grid.

    Args:
        channels: channels of each representation, in the bundle's order (texture first, semantic last).
        names: their names, in the same order; each has its own time embedding.
        grid: height and width of the latents.
        classes: number of classes; label ``classes`` is the null class.
        depth, width, heads: as in ``SIZES``, or any other with width divisible by 4 and head width by 4.
        patch: side of a patch; the network sees (grid / patch)^2 tokens.
        mlp_multiple: the MLP's hidden width, 8/3 of the width, is rounded up to a multiple of it (1: the published
            form).  Products are fast at multiples of 16; the kernels compute others, as 8/3 of 256 or 1,024, with
            zeros besides (``choose_width``).
        repa_width: width of the features that the REPA projector predicts (768 for DINOv2-B), or None for none.
        repa_depth: the number of blocks after which the projector reads the tokens.
        kernels: ``reference``, ``triton`` or ``auto``: who computes the fused operations.  Changes no checkpoint.
        attention: a backend of ``fastasync_kernels.attention``, or ``auto``: sdpa until ``choose_attention`` measures.
        mlp: a backend of ``fastasync_kernels.gated_mlp``, or ``auto``; plain until ``choose_mlp``.

    Weights are float32; under autocast the residual stream is kept in the autocast dtype, norms in float32.

    Raises:
        UserError: sizes that do not divide, or names that cannot be told apart.
    """

    pos_embed: Tensor

    def __init__(
        self,
        *,
        channels: Sequence[int],
        names: Sequence[str],
        grid: int,
        classes: int,
        depth: int,
        width: int,
        heads: int,
        patch: int = 1,
        mlp_multiple: int = 1,
        repa_width: int | None = None,
        repa_depth: int = 2,
        kernels: str = "reference",
        attention: str = "auto",
        mlp: str = "auto",
    ):
        super().__init__()
        _check(channels, names, grid, depth, width, heads, patch, repa_width, repa_depth, kernels, attention, mlp)
        self.channels, self.names = tuple(channels), tuple(names)
        self.grid, self.classes, self.depth, self.width, self.heads = grid, classes, depth, width, heads
        self.patch, self.repa_width, self.repa_depth, self.kernels = patch, repa_width, repa_depth, kernels
        self.attention, self.mlp, self.mlp_multiple = attention, mlp, mlp_multiple
        total, tokens = sum(channels), grid // patch

        self.x_embedder = PatchEmbedding(total, width, patch)
        self.register_buffer("pos_embed", position_table(width, tokens))
        # An even split; the first representation takes the remainder.
        share = width // len(names)
        widths = [width - share * (len(names) - 1)] + [share] * (len(names) - 1)
        if len(names) == 1:
            self._times = ["t_embedder"]
        else:
            self._times = [f"t_embedder_{short_name(name)}" for name in names]
        for name, part in zip(self._times, widths):
            self.add_module(name, TimeEmbedding(part))
        self.y_embedder = LabelEmbedding(classes, width)
        self.feat_rope = RotaryTables(width // heads, tokens)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_multiple) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch * patch * total)
        self.repa_projector: nn.Sequential | None = None
        if repa_width is not None:
            self.repa_projector = nn.Sequential(
                nn.Linear(width, REPA_HIDDEN),
                nn.SiLU(),
                nn.Linear(REPA_HIDDEN, REPA_HIDDEN),
                nn.SiLU(),
                nn.Linear(REPA_HIDDEN, repa_width),
            )
        self.initialize()
        self._ops = self._available_ops()

    @torch.no_grad()
    def initialize(self) -> None:
        """Set weights and tables to their initial values (after ``to_empty`` too), drawing from torch's generator.

        Xavier-uniform linears with zero bias, normal 0.02 for the label table and the time MLPs, zero adaLN and output
        layers: the velocity is zero and every block is the identity.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        for module in self.modules():
            if isinstance(module, TimeEmbedding):
                for name in ("mlp.0.weight", "mlp.2.weight"):
                    nn.init.normal_(module.get_parameter(name), std=0.02)
            elif isinstance(module, Block | FinalLayer):
                _zero(module.adaLN_modulation[1])
        _zero(self.final_layer.linear)
        self.pos_embed.copy_(position_table(self.width, self.grid // self.patch))
        cos, sin = rope_tables(self.width // self.heads, self.grid // self.patch)
        self.feat_rope.freqs_cos.copy_(cos)
        self.feat_rope.freqs_sin.copy_(sin)

    def _available_ops(self) -> Ops | None:
        try:
            return select_ops(self.kernels, self.pos_embed.device, self._attention())
        except UserError:
            return None  # a model is built before it is moved to its device; forward raises if it still cannot run

    def _attention(self) -> str:
        return "sdpa" if self.attention == "auto" else self.attention

    def choose_attention(self, batch: int, dtype: torch.dtype, gradient: bool = True, backend: str = "") -> str:
        """Fix the attention backend for this model's device, ``batch`` samples, ``dtype`` and direction; returns it.

        Call it before the model is compiled or first run, again after it moved to another device.  With ``auto`` the
        backends are measured once in a process (on CUDA).  ``backend`` takes the place of the model's own name.
        Raises UserError when the named backend cannot run here.
        """
        wanted, tokens = backend or self.attention, (self.grid // self.patch) ** 2
        shape = (batch, self.heads, tokens, self.width // self.heads)
        try:
            chosen = kernels_attention.resolve_backend(wanted, self.pos_embed.device, dtype, shape, gradient)
        except kernels_attention.BackendUnavailable as error:
            raise UserError("model.attention", wanted, str(error)) from None
        self._ops = select_ops(self.kernels, self.pos_embed.device, chosen, self.chosen_mlp)
        return chosen

    @property
    def chosen_attention(self) -> str:
        """The backend of attention."""
        return self._ops.attention if self._ops is not None else self._attention()

    @property
    def chosen_mlp(self) -> str:
        """The MLP's backend, ``plain`` or ``quack``."""
        return self._ops.mlp if self._ops is not None else "plain"

    def choose_mlp(self, batch: int, dtype: torch.dtype, gradient: bool = True, backend: str = "") -> str:
        """Fix the MLP's backend as ``choose_attention`` fixes attention's, for linears that are not in fp8; returns it.

        With ``auto`` it is measured once in a process, and ``plain`` where the fused operations are the reference.
        Raises UserError when the named backend cannot run here.
        """
        device = self.pos_embed.device
        ops = self._ops if self._ops is not None else select_ops(self.kernels, device, self._attention())
        wanted = backend or ("plain" if self.mlp == "auto" and not ops.sum_bias else self.mlp)
        shape = gated_mlp.Shape(batch * (self.grid // self.patch) ** 2, self.width, self.product_hidden, self.width)
        try:
            chosen = gated_mlp.resolve_mlp(wanted, ops.swiglu, device, dtype, shape, gradient)
        except gated_mlp.MlpUnavailable as error:
            raise UserError("model.mlp", wanted, str(error)) from None
        self._ops = ops._replace(mlp=chosen)
        return chosen

    def choose_width(self) -> int:
        """Fix the hidden width of the MLPs' products for this model's device; returns it.  Call it before the others.

        Where the fused operations run it is one that is fast (fastasync_kernels.zeros), which 2,730 of L is not.  The
        reference computes as published, as who uses PyTorch alone does.
        """
        hidden = hidden_width(self.width, self.mlp_multiple)
        fused = select_ops(self.kernels, self.pos_embed.device).sum_bias
        for mlp in self._mlps():
            mlp.widen(fast_width(hidden) - hidden if fused else 0)
        return self.product_hidden

    @property
    def product_hidden(self) -> int:
        """The hidden width of the MLPs' products."""
        return hidden_width(self.width, self.mlp_multiple) + self._mlps()[0].units

    def _mlps(self) -> list[SwiGLU]:
        return [module for module in self.modules() if isinstance(module, SwiGLU)]

    def set_recompute(self, what: str) -> None:
        """What the backward pass of every block computes again instead of keeping: one of ``RECOMPUTE``."""
        if what not in RECOMPUTE:
            raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, not {what!r}")
        for module in self.modules():
            if isinstance(module, Block):
                module.recompute = what

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> LightningDiT:
        device = self.pos_embed.device
        super()._apply(fn, recurse)
        if self.pos_embed.device != device:  # otherwise what `choose_attention` found stays
            self._ops = self._available_ops()
        return self

    def conditioning(self, tau: Tensor, y: Tensor) -> Tensor:
        """Time embeddings (reverse bundle order: semantic first) plus the label's: tau [B, K], y [B] -> [B, width]."""
        parts = [getattr(self, name)(tau[:, k]) for k, name in enumerate(self._times)]
        return torch.cat(parts[::-1], dim=1) + self.y_embedder(y)

    def forward(self, x: Tensor, tau: Tensor, y: Tensor, return_repa: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Local velocities of all representations.

        x [B, C, H, W] noised state; tau [B, K] local noising times (0 noise, 1 data); y [B] int64 labels.
        Returns v [B, C, H, W] in float32 (float64 for a float64 model), and with ``return_repa`` also the projected
        tokens [B, N, repa_width] in the same precision.
        """
        ops = self._ops if self._ops is not None else select_ops(self.kernels, x.device, self._attention())
        cos, sin = self.feat_rope.freqs_cos, self.feat_rope.freqs_sin
        condition = self.conditioning(tau, y)
        stream: Tensor = self.x_embedder(x)
        stream = stream + self.pos_embed.to(stream.dtype)
        branch: Tensor | None = None
        gate: Tensor | None = None
        hint: Tensor | None = None
        repa: Tensor | None = None
        for index, block in enumerate(self.blocks, start=1):
            stream, branch, gate, hint = block(stream, branch, gate, hint, condition, cos, sin, ops)
            if return_repa and index == self.repa_depth:
                repa = self._project(stream + gate[:, None] * unhinted(branch, hint))
        v = unpatchify(self.final_layer(stream, branch, gate, hint, condition, ops), self.patch, sum(self.channels))
        v = v.to(torch.promote_types(v.dtype, torch.float32))
        return v if repa is None else (v, repa)

    def _project(self, tokens: Tensor) -> Tensor:
        if self.repa_projector is None:
            raise ValueError("return_repa needs a model with a REPA projector (repa_width=768)")
        projected = self.repa_projector(tokens)
        return projected.to(torch.promote_types(projected.dtype, torch.float32))


def _zero(linear: nn.Module) -> None:
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)


def _check(
    channels: Sequence[int],
    names: Sequence[str],
    grid: int,
    depth: int,
    width: int,
    heads: int,
    patch: int,
    repa_width: int | None,
    repa_depth: int,
    kernels: str,
    attention: str,
    mlp: str,
) -> None:
    """Raise a UserError for the first argument that cannot make a model."""
    if len(channels) != len(names) or not names or min(channels) < 1:
        raise UserError("model.channels", list(channels), f"needs one positive number for each of {list(names)}")
    if len({short_name(name) for name in names}) != len(names) or not all(name.isidentifier() for name in names):
        raise UserError("model.names", list(names), "needs distinct names of letters, digits and underscores")
    if depth < 1 or patch < 1 or grid < patch or grid % patch:
        raise UserError("model.patch", patch, f"must divide the latent grid {grid}, with depth {depth} at least 1")
    if width < 4 or width % 4 or heads < 1 or width % (4 * heads):
        raise UserError("model.width", width, f"must be a multiple of 4 x heads (here 4 x {heads})")
    if repa_width is not None and not 1 <= repa_depth <= depth:
        raise UserError("model.repa_depth", repa_depth, f"must lie between 1 and the depth {depth}")
    if kernels not in KERNELS:
        raise UserError("model.kernels", kernels, f"choose one of {', '.join(KERNELS)}")
    if attention not in ATTENTION:
        raise UserError("model.attention", attention, f"choose one of {', '.join(ATTENTION)}")
    if mlp not in MLP:
        raise UserError("model.mlp", mlp, f"choose one of {', '.join(MLP)}")
