"""From the configuration to the parts that training needs: model, objective, device, precision."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import fastasync_kernels
import torch
from fastasync_kernels import attention, gated_mlp, weight_gradient
from fastasync_kernels.fp8_linear import frozen_rows
from fastasync_kernels.reference import FP8_MULTIPLE
from fastasync_kernels.zeros import fast_width

from fastasync.config import Config
from fastasync.densities import DENSITIES
from fastasync.distributed import session
from fastasync.errors import UserError
from fastasync.model import SIZES, UNDIVIDED, LightningDiT, Zero, memory_estimate, memory_with_zero
from fastasync.model.dit import SwiGLU, hidden_width, select_ops
from fastasync.model.linears import BlockLinear, Linear
from fastasync.model.recompute import RECOMPUTE
from fastasync.objective import Objective
from fastasync.optim import build_optimizer, library
from fastasync.training.graph import check_recording

_log = logging.getLogger(__name__)
USABLE = 0.9  # share of the free memory that an estimate may fill


def build_model(config: Config) -> LightningDiT:
    """The network of a configuration, float32 on the current default device, freshly initialised."""
    model, representations = config.model, config.representations
    depth, width, heads = SIZES.get(model.size, (model.depth, model.width, model.heads))
    return LightningDiT(
        channels=representations.channels,
        names=representations.names,
        grid=representations.grid,
        classes=model.classes,
        depth=depth,
        width=width,
        heads=heads,
        patch=model.patch,
        mlp_multiple=model.mlp_multiple,
        repa_width=model.repa_width or None,
        kernels=model.kernels,
        attention=model.attention,
        mlp=model.mlp,
    )


Gather = Callable[[Any], list[Any]]


def prepare_model(
    model: LightningDiT,
    config: Config,
    device: torch.device,
    batch: int,
    gather: Gather = lambda own: [own],
    zero: Zero = UNDIVIDED,
) -> LightningDiT:
    """The network ready to be trained on ``device`` in parts of ``batch`` samples; not compiled yet.

    Moves it, fixes the backends of attention and MLP, turns the block linears to fp8 where ``train.precision`` asks for
    it or divides their weights' gradients, and chooses what the backward pass recomputes.  Names and shapes of the
    state dict stay as they are.  ``gather``: one value of each rank, in their order (collective): all ranks take the
    same choices, and recompute what the one with the least free memory must; ``zero``: how they divide it.
    Raises UserError for what cannot run here.
    """
    train = config.train
    model = model.to(device)
    dtype = choose_autocast(train.precision, device)
    model.choose_width()
    model.choose_attention(batch, dtype or torch.float32)
    if train.precision == "fp8":
        use_fp8(model, device)
    else:
        if dtype is not None:
            divide_weight_gradients(model, batch, dtype, device)
        if train.zero < 3:  # which gathers each layer's weights when the layer is called
            model.choose_mlp(batch, dtype or torch.float32)
    agree_on_backends(model, batch, dtype or torch.float32, gather)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    memory = choose_memory(train.memory, model, batch, "fp32" if dtype is None else "bf16", free, zero)
    memory = max(gather(memory), key=RECOMPUTE.index)
    model.set_recompute(memory)
    _log.info("attention %s, MLP %s, memory %s", model.chosen_attention, model.chosen_mlp, memory)
    return model


class Backends(NamedTuple):
    """What a rank found fastest; ``parts`` of each block linear's gradient; whether the kernels are ``fused``."""

    attention: str
    mlp: str
    parts: tuple[int, ...]
    fused: bool


def agree_on_backends(
    model: LightningDiT, batch: int, dtype: torch.dtype, gather: Gather, gradient: bool = True
) -> None:
    """Take rank 0's backends on every rank: each has measured for itself, and times have noise.

    Gradients come in another order with other backends, so ZeRO 2 would reduce other ones together on each rank, and
    sums would be of numbers that are rounded in different ways; a sample would depend on the rank that made it.  Where
    a rank cannot run them, all take PyTorch's own.
    Raises UserError where Triton's kernels run on some ranks only.
    """
    linears = [module for module in model.modules() if isinstance(module, BlockLinear)]
    fused = select_ops(model.kernels, model.pos_embed.device).sum_bias
    found = gather(Backends(model.chosen_attention, model.chosen_mlp, tuple(each.parts for each in linears), fused))
    if len(set(found)) == 1:
        return
    if len({each.fused for each in found}) > 1:
        ranks = ", ".join(str(rank) for rank, each in enumerate(found) if not each.fused)
        raise UserError("model.kernels", model.kernels, f"Triton does not run on ranks {ranks}: set it to reference")
    chosen = found[0]
    _log.info("ranks found different backends fastest, all take rank 0's: %s", chosen)

    def take(attention: str, mlp: str) -> bool:
        try:
            model.choose_attention(batch, dtype, gradient, attention)
            model.choose_mlp(batch, dtype, gradient, mlp)
        except UserError as error:
            _log.warning("%s", error)
            return False
        return True

    if not all(gather(take(chosen.attention, chosen.mlp))):
        _log.info("rank 0's backends do not run on every rank: all take attention sdpa, MLP plain")
        take("sdpa", "plain")
    for linear, parts in zip(linears, chosen.parts):
        linear.parts = parts


def prepare_sampling(
    model: LightningDiT, batch: int, precision: str, device: torch.device, gather: Gather = lambda own: [own]
) -> torch.dtype | None:
    """Make a network on ``device`` ready to be sampled from, ``batch`` samples at a time; returns its autocast dtype.

    Fixes the backends of attention and MLP for passes without gradients, and brings the weights, which must not change
    any more, into the form that the products take.  ``precision``: ``auto``, ``bf16``, ``fp32`` or ``fp8``;
    ``gather``: as for ``prepare_model``.
    Raises UserError for what cannot run here.
    """
    dtype = choose_autocast(precision, device)
    model.choose_width()
    model.choose_attention(batch, dtype or torch.float32, gradient=False)
    if precision == "fp8":
        use_fp8(model, device, frozen=True)
    else:
        model.choose_mlp(batch, dtype or torch.float32, gradient=False)
    agree_on_backends(model, batch, dtype or torch.float32, gather, gradient=False)
    if dtype is not None:
        round_linears(model, dtype)
    for module in model.modules():
        if isinstance(module, SwiGLU) and (model.chosen_mlp == "quack" or module.units):
            module.freeze(dtype or torch.float32, model.chosen_mlp)
    return dtype


def divide_weight_gradients(model: LightningDiT, batch: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compute the gradients of the block linears' weights in as many parts as is fastest here (measured on CUDA)."""
    rows = batch * (model.grid // model.patch) ** 2
    for module in model.modules():
        if isinstance(module, BlockLinear) and module.weight.requires_grad:
            outputs, inputs = module.product_shape
            module.parts = weight_gradient.choose_parts(rows, outputs, inputs, dtype, device)


def choose_memory(
    memory: str, model: LightningDiT, batch: int, precision: str, free: int | None, zero: Zero = UNDIVIDED
) -> str:
    """What the backward pass recomputes: ``memory``, or for "auto" the least that fits into ``free`` bytes.

    ``free``: device memory with the float32 weights already in it, or None where it is not known (the CPU): then
    nothing.  ``zero``: how DeepSpeed divides what is held.
    """
    if memory != "auto":
        return memory
    if free is None:
        return "none"
    for what in RECOMPUTE:
        estimate = memory_estimate(model, batch, precision, what)
        # one process: the bf16 copy's gradients are bf16 too, which makes up for it; float32 weights are as large as
        # their gradients
        held = estimate.gradients if zero.stage else estimate.weights
        if memory_with_zero(estimate, zero) - held <= USABLE * free:
            return what
    return RECOMPUTE[-1]


def check_training(config: Config, device: torch.device) -> None:
    """What `prepare_model` and the engine would refuse on ``device``, before any work.  Raises UserError."""
    train, model, representations = config.train, config.model, config.representations
    if train.precision == "fp8":
        check_fp8(device)
    check_recording(train.cuda_graph, device, train.optimizer)
    if train.optimizer == "apex":
        build_optimizer([torch.zeros(1, device=device)], train.optimizer)
    _, width, heads = SIZES.get(model.size, (model.depth, model.width, model.heads))
    tokens = (representations.grid // model.patch) ** 2
    dtype = choose_autocast(train.precision, device) or torch.float32
    if model.mlp == "quack":
        if train.precision == "fp8" or train.zero == 3:
            field = "train.zero=3" if train.zero == 3 else "train.precision=fp8"
            raise UserError("model.mlp", "quack", f"does not go with {field}: choose auto or plain")
        hidden = hidden_width(width, model.mlp_multiple)
        hidden = fast_width(hidden) if select_ops(model.kernels, device).sum_bias else hidden
        sizes = gated_mlp.Shape(train.batch * tokens, width, hidden, width)
        if reason := gated_mlp.refusal(device, dtype, sizes):
            raise UserError("model.mlp", "quack", reason)
    if model.attention != "auto":  # auto takes what there is
        shape = (train.batch, heads, tokens, width // heads)
        try:
            attention.resolve_backend(model.attention, device, dtype, shape, True)
        except attention.BackendUnavailable as error:
            raise UserError("model.attention", model.attention, str(error)) from None


def check_fp8(device: torch.device, field: str = "train.precision") -> None:
    """Raises UserError, naming ``field``, unless ``device`` is a GPU that has fp8 products."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(field, "fp8", f"needs a GPU with fp8 products (H100, L4 or newer), not {device}")


def use_fp8(model: LightningDiT, device: torch.device, emulate: bool = False, frozen: bool = False) -> None:
    """Run the block linears' products, forward and backward, in fp8 with a scale for each row, in place.

    adaLN, embeddings, REPA and the final layer stay as they are, and so do the names and shapes of the state dict.
    Block linears whose products have a size that is no multiple of 16 stay in bf16 too (the MLPs of L and 1p6B, without
    the kernels: see ``LightningDiT.choose_width``), with a line that says so.
    ``emulate``: on any device, slowly.  ``frozen``: the weights, on their device, change no more: they are cast once,
    for passes without gradients.  Raises UserError without a GPU that has fp8 products.
    """
    if not emulate:
        check_fp8(device)
    kind = "triton" if choose_ops(model.kernels, device).__name__.endswith("triton_ops") else "reference"
    if kind == "triton" and device.type == "cuda" and (fault := _casts_fault(device)):
        _log.warning("fp8: casts in PyTorch, much slower, for those of the kernels are wrong here: %s", fault)
        kind = "reference"
    linears = {name: module for name, module in model.named_modules() if isinstance(module, BlockLinear)}
    odd = [name for name, linear in linears.items() if any(size % FP8_MULTIPLE for size in linear.product_shape)]
    if odd:
        counts, shape = f"{len(odd)} of {len(linears)}", list(linears[odd[0]].weight.shape)
        _log.warning("fp8: %s block linears stay in bf16, %s %s is no multiple of 16 both ways", counts, odd[0], shape)
    for name, linear in linears.items():
        linear.fp8 = None if name in odd else kind
        weight = linear.zeros.beside(linear.weight)
        linear.frozen = frozen_rows(weight, kind == "triton") if frozen and linear.fp8 else None


def _casts_fault(device: torch.device) -> str:
    from fastasync_kernels.selfcheck import casts_disagreement  # imports triton

    return casts_disagreement(device)


def trains_working_weights(config: Config, device: torch.device) -> bool:
    """Whether bf16 weights are trained: under autocast, where the compiled AdamW updates them.

    It writes the bf16 weights in its one pass over the float32 ones.  Not where gradients of several parts are summed,
    for which bf16 is too coarse.
    """
    train = config.train
    compiled = train.optimizer in ("auto", "fused") and library.load(device.type) is not None
    return choose_autocast(train.precision, device) is not None and compiled and train.accumulate == 1


def use_working_weights(model: LightningDiT, config: Config, device: torch.device) -> list[torch.Tensor] | None:
    """Keep in bf16 what autocast would cast to bf16 in every step; returns all float32 weights, for the optimizer.

    The same numbers without the casts, of the weights and back of their gradients (fp8 rounds weights twice then).
    Changes nothing and returns None where `trains_working_weights` does not hold.
    """
    dtype = choose_autocast(config.train.precision, device)
    if dtype is None or not trains_working_weights(config, device):
        return None
    masters = [p.detach() for p in model.parameters()]
    round_linears(model, dtype, training=True)
    return masters


def round_linears(model: LightningDiT, dtype: torch.dtype, training: bool = False) -> None:
    """Keep the weights and biases of linears and convolutions in the autocast dtype: the same results without casts.

    ``training``: but for the biases whose gradients our kernels sum in float32.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            kept = training and isinstance(module, Linear)
            for p in [module.weight] if kept else [module.weight, module.bias]:
                if p is not None and (p.requires_grad or not training):
                    p.data = p.data.to(dtype)


def build_objective(config: Config) -> Objective:
    """The training objective of a configuration."""
    chosen = config.objective
    return Objective(
        channels=config.representations.channels,
        loss_weights=config.loss_weights,
        density=DENSITIES[chosen.density],
        mode=chosen.mode,
        proposal=chosen.proposal,
        cosine_weight=chosen.cosine_weight,
        repa_weight=chosen.repa_weight,
    )


def choose_device(name: str) -> torch.device:
    """``auto`` (CUDA when there is one), ``cpu`` or ``cuda``: this rank's own, which becomes the current device.

    UserError when CUDA is asked for and absent, or has fewer devices than the launcher started ranks here.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device", "cuda", "no CUDA device is available here; use auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    here, count = session(), torch.cuda.device_count()
    if here.world > 1:
        if here.local >= count:
            raise UserError("LOCAL_RANK", here.local, f"there are {count} CUDA devices: start at most so many ranks")
        torch.cuda.set_device(here.local)
    return torch.device("cuda")


def choose_autocast(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype, or None for float32.  ``auto``: bf16 on CUDA, float32 on the CPU.  fp8 runs under bf16."""
    if precision in ("bf16", "fp8") or (precision == "auto" and device.type == "cuda"):
        return torch.bfloat16
    return None


def choose_ops(kernels: str, device: torch.device) -> ModuleType:
    """The fused operations, or their reference.  UserError when Triton is asked for and cannot run here."""
    try:
        return fastasync_kernels.select(kernels, device)
    except fastasync_kernels.KernelUnavailable as error:
        raise UserError("model.kernels", kernels, str(error)) from None
