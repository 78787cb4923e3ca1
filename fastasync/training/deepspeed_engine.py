"""The engine of many ranks: DeepSpeed ZeRO 0 to 3 around the same network, optimizer and checkpoints.

Precision is autocast over float32 weights, as in the plain engine, and our AdamW with its EMA is DeepSpeed's client
optimizer: the EMA is optimizer state, so ZeRO shards it.  Bytes a parameter on each of N ranks (weights + gradients +
two moments, EMA; stage 3 keeps a second copy of its weights):

    ZeRO 0: 4 + 4 + 12      1: 4 + 4 + 12 / N      2: 4 + (4 + 12) / N      3: (4 + 4 + 16) / N

In stages 1 and 2 the weights of linears are bf16 where the plain engine's are (`build.use_working_weights`), and each
rank holds the float32 ones of its shard: 2 + 2 + 16 / N and 2 + (4 + 16) / N.  There we reduce the gradients ourselves
(`deepspeed_shards`), unless the user's JSON says how DeepSpeed is to.

In stages 0 to 2 our update clips: it needs no pass over the gradients of its own for that, and no wait of the host.

In stage 1 with our reduction, forward and backward may be replayed from a CUDA graph (``train.cuda_graph``): launches
bind steps of few images a rank, and fp8's.  A recording holds no collective; where a rank has no room for it, or gains
nothing by it, all go on without.  Steps that may be recorded go around DeepSpeed's engine, whose timers, counters and
monitors do not see them (so ``auto`` leaves them alone where a JSON is given).  With a recording the memory that
gradients are reduced in is kept, 4 + 4 / N bytes a parameter.

A checkpoint is the plain engine's, whatever the stage and the number of ranks: the full tensors travel to rank 0 one
by one and are written as they come, so saving holds one parameter more than training does.  It costs, for each
parameter, four collectives of its size (weight, EMA, two moments: 16 bytes), and rank 0's disk.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.torch_version import TorchVersion

from fastasync.config import Config
from fastasync.distributed import TIMEOUT, session
from fastasync.errors import UserError, not_installed, require
from fastasync.model import LightningDiT, train_flops
from fastasync.optim import build_optimizer
from fastasync.training.build import choose_autocast, choose_device, prepare_model, use_working_weights
from fastasync.training.checkpoint import EMA, MODEL, read_tensors, stream_tensors
from fastasync.training.deepspeed_json import Asked, check_known, deepspeed_json, reduction_fields, zero_of
from fastasync.training.deepspeed_shards import Shards, whole_packs
from fastasync.training.engine import (
    OPTIMIZER,
    OPTIMIZER_NUMBERS,
    Compute,
    clipped_step,
    compile_in_place,
    split_positions,
)
from fastasync.training.graph import GraphedStep, Part, ranks_may_record, to_be_watched, wants_graph

T = TypeVar("T")
OLDEST = "0.19.7"  # of DeepSpeed: the first that can leave the gradients' norm to us
_log = logging.getLogger(__name__)
_STATE = ("exp_avg", "exp_avg_sq", "ema")


class _Autocast(nn.Module):
    """The network under our autocast: DeepSpeed switches off one that it finds around itself."""

    def __init__(self, model: LightningDiT, dtype: torch.dtype | None):
        super().__init__()
        self.network, self.dtype = model, dtype

    def forward(self, x: Tensor, tau: Tensor, y: Tensor, **options: Any) -> Any:
        # ZeRO 3 swaps the weights' memory, so a cast kept from one use to the next would outlive them
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype is not None, cache_enabled=False):
            return self.network(x, tau, y, **options)


class DeepSpeedEngine:
    """One rank of DeepSpeed.  Every method but ``positions``, ``forward`` and ``backward`` is a collective call.

    Raises:
        UserError: DeepSpeed is missing, the batch does not divide, or a setting cannot be had with it.
    """

    def __init__(self, model: LightningDiT, config: Config, device: torch.device):
        train, here = config.train, session()
        check_deepspeed(config, here.world)
        os.environ.setdefault("LOCAL_RANK", str(here.local))  # DeepSpeed insists, without a launcher too
        deepspeed = require("deepspeed", "deepspeed")
        log = logging.getLogger("DeepSpeed")
        # torch calls the collectives that DeepSpeed uses by older names than its newest
        warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
        # an operation for inference that DeepSpeed compiles on CPUs: 40 s, or no end where a killed build left its lock
        require("deepspeed.ops", "deepspeed").__compatible_ops__["deepspeed_shm_comm"] = False
        self._zero = require("deepspeed.utils", "deepspeed")
        self.device, self.rank, self.world, self.is_main = device, here.rank, here.world, here.is_main
        self._control = here.start_group(device, max(TIMEOUT, timedelta(minutes=train.stall_minutes)))
        self._train, self.stage = train, train.zero

        part = train.batch // (self.world * train.accumulate)
        self.model = prepare_model(
            model, config, device, part, self._gather, zero_of(config, device, self.world)
        ).train()
        settings = deepspeed_json(config, self.world)
        theirs = reduction_fields(config) if self.stage in (1, 2) else []
        self._clips = self.stage < 3
        self._reduces = self.stage in (1, 2) and not theirs
        if theirs and self.is_main:
            _log.warning("DeepSpeed reduces gradients, not we, as train.deepspeed_config sets %s", ", ".join(theirs))
        masters = use_working_weights(self.model, config, device) if self._reduces else None
        trained = [p for p in self.model.parameters() if p.requires_grad]
        # DeepSpeed takes the first group's dtype for that of all gradients
        kinds = [[p for p in trained if (p.dtype == torch.float32) == wide] for wide in (True, False)]
        self.optimizer = build_optimizer(
            [{"params": params} for params in kinds if params],
            impl=train.optimizer,
            lr=train.lr,
            betas=(train.betas[0], train.betas[1]),
            weight_decay=train.weight_decay,
            ema_decay=train.ema,
        )
        compile_in_place(self.model, train.compile)
        if self._clips:
            settings["gradient_clipping"] = 0.0
        if self._clips and self.stage:
            settings["zero_optimization"]["compute_grad_norm"] = False
        self._plain_step = self.optimizer.step
        self.optimizer.step = self._update  # type: ignore[method-assign]
        self._updating, self._norm = False, torch.zeros((), device=device)
        self._limit: Tensor | None = None
        self._wrapped = _Autocast(self.model, choose_autocast(train.precision, device))
        log.setLevel(logging.ERROR)  # it warns of every optimizer that is not its own
        with whole_packs() if self._reduces else nullcontext():
            self._engine, self._sharded, _, _ = deepspeed.initialize(
                model=self._wrapped, optimizer=self.optimizer, config=settings, dist_init_required=False
            )
        log.setLevel(logging.WARNING)
        self._parts_done = 0
        if self._clips and self.stage:
            self._share_weights()
        if masters is not None:
            self._unround(masters)
        if self._reduces:
            self._shards = Shards(self._sharded, self.stage, self.world, self.rank, self._update)
        self._make_state()
        self._trained = trained
        self._graphed: GraphedStep | None = None
        self._graded: list[nn.Parameter] = []  # those that a step gives gradients
        flops = train_flops(self.model) * part
        self._watch = to_be_watched(train.cuda_graph, flops, train.precision)
        # whether steps go around DeepSpeed's engine, which cannot be recorded: on all ranks or on none
        self._around = ranks_may_record(train)
        if self._around:
            wanted = wants_graph(train.cuda_graph, device, self.optimizer, flops, train.precision)
            self._around = not self.any(not wanted)
        self._settled = False  # all ranks know whether all replay

    # --- a step -------------------------------------------------------------------------------------------------

    def positions(self) -> list[Tensor]:
        return split_positions(self._train.batch, self.world, self.rank, self._train.accumulate)

    def forward(self, x: Tensor, tau: Tensor, y: Tensor, **options: Any) -> Any:
        if self._around:
            return self._wrapped.forward(x, tau, y, **options)  # not called: DeepSpeed hooks into that
        return self._engine(x, tau, y, **options)

    def backward(self, loss: Tensor) -> None:
        if self._around:
            (loss / self._train.accumulate).backward()
            return
        self._engine.backward(loss)
        self._parts_done += 1
        if self._parts_done < self._train.accumulate:
            self._engine.step()  # only counts the part

    def step(self, lr: float | Tensor, limit: Tensor | None = None) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._parts_done, self._limit = 0, limit
        if self._around:
            self._shards.reduce()
            self._sharded.step()
        else:
            self._engine.step()
        if not self._clips:
            self._norm = torch.as_tensor(self._sharded._global_grad_norm, dtype=torch.float32, device=self.device)
        return self._norm

    def run(
        self, compute: Compute, step: int, parts: Sequence[Part], lr: float, limit: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if not self._around:
            return compute(step, parts), self.step(lr, limit)
        if self._graphed is None:
            self._graphed = GraphedStep(
                lambda step, parts: self._gradients(compute, step, parts),
                self.device,
                undo=self._forget,
                careful=self._train.cuda_graph == "auto",
                watch=self._watch,
                before=self._shards.keep,
                beside=self._shards.kept_bytes,
            )
        values, *gradients = self._graphed(step, parts)
        for p, gradient in zip(self._graded, gradients, strict=True):  # of a replay: in the recording's memory
            p.grad = gradient
        norm = self.step(lr, limit)
        if not self._settled and (self._graphed.replays or self._graphed.refused):  # at the same step on all ranks
            self._settled = True
            if self.any(self._graphed.refused):
                if self._graphed.replays:
                    _log.info("steps are not recorded: those of another rank are not")
                self._graphed, self._around = None, False
                self._shards.keep(False)
        return values, norm

    def _gradients(self, compute: Compute, step: int | Tensor, parts: Sequence[Part]) -> tuple[Tensor, ...]:
        """The step's terms, and the gradients of this rank's part of the batch."""
        self._forget()
        values = compute(step, parts)
        found = [(p, p.grad) for p in self._trained if p.grad is not None]
        self._graded = [p for p, _ in found]
        return values, *(gradient for _, gradient in found)

    def _forget(self) -> None:
        for p in self._trained:
            p.grad = None

    @property
    def recorded(self) -> bool:
        """Whether forward and backward are replayed from a CUDA graph."""
        return self._graphed is not None and self._graphed.replays

    @torch.no_grad()
    def _update(self, *arguments: Any, **options: Any) -> Any:
        """What DeepSpeed calls instead of the optimizer's step.

        The gradients arrive reduced; under stage 3 clipped too, the norm is known, and DeepSpeed has left out steps
        whose norm is not finite (it reads the norm on the host for that).
        """
        if self._updating:  # from within clip_and_step
            return self._plain_step(*arguments, **options)
        self._updating = True
        try:
            if self.stage == 0:
                self._norm = clipped_step(self.optimizer, self._train.clip, self._limit)
            elif self._clips:
                scale = 1 / self.world if self._reduces else 1.0  # our reduction sums, DeepSpeed's averages
                self.optimizer.clip_and_step(self._train.clip or None, scale, self._norm_of_all)
            elif self._limit is None or float(self._sharded._global_grad_norm) <= float(self._limit):
                self._plain_step()
        finally:
            self._updating = False

    def _norm_of_all(self, norm: Tensor) -> Tensor:
        """The norm of all gradients from that of this rank's shard: NaN, which leaves the step out, above the limit."""
        square = norm.double().square()
        if self.world > 1:
            distributed.all_reduce(square)
        self._norm = square.sqrt().to(torch.float32)
        return self._norm if self._limit is None else self._norm.masked_fill(self._norm > self._limit, torch.nan)

    # --- all ranks ----------------------------------------------------------------------------------------------

    def mean(self, values: Tensor) -> Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total / self.world

    def _gather(self, own: T) -> list[T]:
        """What every rank has, in their order."""
        found: list[T] = [own] * self.world
        distributed.all_gather_object(found, own, group=self._control)
        return found

    def any(self, flag: bool) -> bool:
        seen = torch.tensor([int(flag)])
        distributed.all_reduce(seen, op=distributed.ReduceOp.MAX, group=self._control)
        return bool(seen.item())

    def barrier(self) -> None:
        self.any(False)

    def from_main(self, compute: Callable[[], T]) -> T:
        return session().from_main(compute)

    # --- state --------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _named(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _owned(self) -> list[Tensor]:
        """The float32 tensors that this rank's optimizer updates: the weights themselves, or its shards of them."""
        if self.stage == 0:
            return list(self._named.values())
        if self.stage == 3:
            return list(self._sharded.fp32_partitioned_groups_flat)
        return list(self._sharded.single_partition_of_fp32_groups)

    @torch.no_grad()  # else the views that it keeps of weights hold nodes of autograd, bound to the stream of now
    def _share_weights(self) -> None:
        """Make DeepSpeed's float32 copy of this rank's weights the weights themselves where they are float32."""
        sharded = self._sharded
        for copy, shards in zip(sharded.single_partition_of_fp32_groups, sharded.parallel_partitioned_bit16_groups):
            if shards[self.rank].dtype == copy.dtype:
                copy.data = shards[self.rank].data
        sharded._link_all_hp_params()

    @torch.no_grad()
    def _unround(self, masters: Sequence[Tensor]) -> None:
        """Train from rank 0's float32 weights, not from what working weights were rounded to."""
        for p, master in zip(self.model.parameters(), masters):
            if p.dtype != master.dtype:
                distributed.broadcast(master, 0)
                self._set(p, None, master)

    @torch.no_grad()
    def _make_state(self) -> None:
        """Make the optimizer's state now rather than at the first update, so that there is something to load into.

        A step with zero gradients and learning rate 0 leaves moments of 0, the weights, and an EMA equal to them.
        """
        group = self.optimizer.param_groups[0]
        kept = group["params"], group["lr"]
        for tensor in self._owned():
            group["params"], group["lr"] = [tensor], 0.0
            tensor.grad = torch.zeros_like(tensor)
            self._plain_step()
            self.optimizer.state[tensor]["step"].zero_()
            tensor.grad = None
        group["params"], group["lr"] = kept
        if self.stage in (1, 2):
            # DeepSpeed's views into the state are made once
            self._sharded._hp_optimizer_states_linked = False
            self._sharded._lazy_init_hp_params_optimizer_state()

    def _full(self, p: nn.Parameter, key: str | None) -> Tensor:
        """One parameter's float32 weight (None) or optimizer state, whole, on every rank."""
        if self.stage == 0:
            return p.detach() if key is None else self.optimizer.state[p][key]
        if key is None:
            return self._zero.safe_get_full_fp32_param(p)
        return self._zero.safe_get_full_optimizer_state(p, key)

    @torch.no_grad()
    def _set(self, p: Any, key: str | None, value: Tensor) -> None:
        """Write this rank's share of a whole tensor (on the CPU)."""
        if self.stage == 0:
            (p if key is None else self.optimizer.state[p][key]).copy_(value)
        elif self.stage == 3:
            size = p.ds_tensor.ds_numel
            shard = nn.functional.pad(value.flatten(), (0, size * self.world - value.numel()))
            shard = shard[self.rank * size :][:size].to(self.device)
            if key is None:
                self._zero.safe_set_local_fp32_param(p, shard)
                p.ds_tensor.data.copy_(shard)
                if p.data.numel() == value.numel():  # small parameters are kept whole everywhere
                    p.data.copy_(value)
            else:
                self._zero.safe_set_local_optimizer_state(p, shard, key)
        elif key is None:
            p.data.copy_(value)
            self._zero.safe_set_full_fp32_param(p, value)
        else:
            self._zero.safe_set_full_optimizer_state(p, value, key)

    @torch.no_grad()
    def first_nonfinite(self) -> str | None:
        here = [tensor for p in self._owned() for tensor in (p, *(self.optimizer.state[p][key] for key in _STATE))]
        finite = torch.stack([tensor.isfinite().all() for tensor in here]).all()
        if not self.any(not bool(finite)):
            return None
        for kind, key in (
            ("weight", None),
            ("average of", "ema"),
            ("moment of", "exp_avg"),
            ("moment of", "exp_avg_sq"),
        ):
            for name, p in self._named.items():
                if not bool(self._full(p, key).isfinite().all()):
                    return f"{kind} {name}"
        return "padding of a shard"

    def _files(self) -> dict[str, dict[str, tuple[nn.Parameter, str | None]]]:
        """What stands in which file under which name, without the fixed tables."""
        moments: dict[str, tuple[nn.Parameter, str | None]]
        moments = {f"{name}/{key}": (p, key) for name, p in self._named.items() for key in _STATE[:2]}
        return {
            MODEL: {name: (p, None) for name, p in self._named.items()},
            EMA: {name: (p, "ema") for name, p in self._named.items()},
            OPTIMIZER: moments,
        }

    @torch.no_grad()
    def save(self, directory: Path) -> None:
        step = self.optimizer.state[self._owned()[0]]["step"].detach().to("cpu", torch.float32)
        tables = {name: value for name, value in self.model.state_dict().items() if name not in self._named}
        counts = {f"{name}/step": step for name in self._named}
        failed: Exception | None = None
        for file, entries in self._files().items():
            fixed = counts if file == OPTIMIZER else tables
            shapes = {name: getattr(p, "ds_shape", p.shape) for name, (p, _) in entries.items()}
            gathered = ((name, self._full(p, key)) for name, (p, key) in entries.items())
            if self.is_main and failed is None:
                try:
                    stream_tensors(directory / file, fixed, shapes, gathered)
                except OSError as error:
                    failed = error
            for _ in gathered:  # the others are in this collective, whatever happened to the file
                pass
        if failed is not None:
            raise failed
        if self.is_main:
            (directory / OPTIMIZER_NUMBERS).write_text("{}")

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        files = self._files()
        with ExitStack() as stack:
            read = {file: stack.enter_context(read_tensors(directory / file)) for file in files}
            for name, p in self._named.items():
                self._set(p, None, read[MODEL](name))
                average = read[EMA](name)
                self._set(p, "ema", average)
                for key in _STATE[:2]:
                    # a weight that the run has not updated yet has no moments there
                    moment = read[OPTIMIZER](f"{name}/{key}", missing=None)
                    self._set(p, key, torch.zeros_like(average) if moment is None else moment)
            counts = [read[OPTIMIZER](f"{name}/step", missing=None) for name in self._named]
            done = max((float(count) for count in counts if count is not None), default=0.0)
            for tensor in self._owned():
                self.optimizer.state[tensor]["step"].fill_(done)
            for name, table in self.model.named_buffers():
                table.copy_(read[MODEL](name))


def _installed(package: str) -> bool:
    """Whether it can be imported; without doing so, which takes seconds and prints lines."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # it stands among the imported modules, as None
        return False


def check_deepspeed(config: Config, world: int) -> None:
    """Everything about a DeepSpeed run that can be refused before it starts.  Raises UserError."""
    train = config.train
    split_positions(train.batch, world, 0, train.accumulate)
    if not _installed("deepspeed"):
        raise not_installed("deepspeed", "deepspeed")
    found = importlib.metadata.version("deepspeed")
    if TorchVersion(found) < OLDEST:
        raise UserError("package deepspeed", found, f"needs {OLDEST} or newer: pip install 'fastasync[deepspeed]'")
    deepspeed_json(config, world)
    if train.optimizer == "apex":
        raise UserError("train.optimizer", "apex", "keeps no step count of its own: use auto, fused or torch here")
    if train.cuda_graph == "on" and (train.zero != 1 or reduction_fields(config)):
        remedy = "use off or auto, or train.zero=1 without a JSON that says how to reduce gradients"
        raise UserError("train.cuda_graph", "on", f"records steps of several ranks under ZeRO 1 only: {remedy}")
    if train.compile != "off" and train.zero == 3:
        # its hooks on every layer are traced too: slower than without, and recompiled for each
        raise UserError("train.compile", train.compile, "does not go with train.zero=3: set it to off, or zero to 2")
    if train.precision == "fp8" and train.zero == 3:
        raise UserError("train.zero", 3, "is not tested with train.precision=fp8: use 0, 1 or 2")
    os.environ.setdefault("DS_ACCELERATOR", choose_device(train.device).type)
    try:
        require("deepspeed", "deepspeed")
    except (ImportError, RuntimeError, AssertionError) as error:
        raise UserError("train.engine", "deepspeed", f"does not import here ({_brief(error)})") from None
    if train.deepspeed_config:
        _check_json(config, world)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _check_json(config: Config, world: int) -> None:
    """Raises UserError for what DeepSpeed does not understand in the user's JSON, or does not read at all.

    Of the former it would say so after work has begun, of the latter never.
    """
    settings = Asked(deepspeed_json(config, world))
    del settings["train_batch_size"]  # it compares with the ranks that have met, which are none yet
    read = require("deepspeed.runtime.config", "deepspeed").DeepSpeedConfig
    log = logging.getLogger("DeepSpeed")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        read(settings)
    except Exception as error:  # pydantic's, a TypeError, an assertion: whatever it meets
        what = f"is not understood by DeepSpeed ({type(error).__name__}: {_brief(error)})"
        raise UserError("train.deepspeed_config", config.train.deepspeed_config, what) from None
    finally:
        log.setLevel(level)
    check_known(config, settings)
