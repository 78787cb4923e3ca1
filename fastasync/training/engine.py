"""The seam between the training loop and who executes it: one process here, DeepSpeed beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fastasync.compat import shorten_compiler_messages
from fastasync.config import Config
from fastasync.distributed import Session, session
from fastasync.errors import UserError
from fastasync.model import LightningDiT, train_flops
from fastasync.optim import EmaInterface, build_optimizer, ema_parameters
from fastasync.training.build import choose_autocast, prepare_model, use_working_weights
from fastasync.training.checkpoint import EMA, MODEL, load_tensors, save_tensors
from fastasync.training.graph import GraphedStep, Part, to_be_watched, wants_graph

OPTIMIZER, OPTIMIZER_NUMBERS = "optimizer.safetensors", "optimizer.json"
T = TypeVar("T")

Compute = Callable[[int | Tensor, Sequence[Part]], Tensor]


class Engine(Protocol):
    """What the loop asks for.  Every rank makes the same calls in the same order; collective ones are marked."""

    model: LightningDiT
    device: torch.device
    rank: int
    world: int
    is_main: bool  # whether this rank writes the run's files and prints

    @property
    def recorded(self) -> bool:
        """Whether forward and backward are replayed from a CUDA graph by now."""

    def positions(self) -> list[Tensor]:
        """This rank's positions in the global batch, int64 on the CPU: one tensor for each part of the accumulation."""

    def forward(self, x: Tensor, tau: Tensor, y: Tensor, **options: Any) -> Any:
        """The network, under autocast."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one part's mean loss (scaled so that the parts average)."""

    def step(self, lr: float, limit: Tensor | None = None) -> Tensor:
        """Reduce (collective), clip, update weights and EMA.  Returns the norm before clipping, 0-d on the device.

        When it is not finite, or above ``limit`` (0-d on the device), nothing has been updated.
        """

    def run(
        self, compute: Compute, step: int, parts: Sequence[Part], lr: float, limit: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``compute(step, parts)``, which calls ``forward`` and ``backward`` for every part, and then ``step``.

        ``compute`` and ``limit`` must be the same objects at every step.  Returns what it gives, and the norm, until
        the next call.
        """

    def mean(self, values: Tensor) -> Tensor:
        """Average over the ranks (collective)."""

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank (collective)."""

    def barrier(self) -> None:
        """Wait for every rank (collective)."""

    def from_main(self, compute: Callable[[], T]) -> T:
        """What ``compute`` returns on the main rank (collective; the others wait without a limit)."""

    def first_nonfinite(self) -> str | None:
        """The name of a weight, average or moment that holds NaN or infinity (collective).  Waits for the device."""

    def save(self, directory: Path) -> None:
        """Write the whole state, with ema.safetensors complete (collective).  Not atomic: see checkpoint.save."""

    def load(self, directory: Path) -> None:
        """Continue from what ``save`` wrote (collective)."""


def split_positions(batch: int, world: int, rank: int, accumulate: int) -> list[Tensor]:
    """Positions of one rank: the global batch in ``accumulate`` parts, each part split over ``world`` ranks.

    Noise, times and label dropout are keyed by the position, so no split changes what is computed.
    Raises UserError when it does not divide; says the nearest batch that does.
    """
    parts = world * accumulate
    if batch % parts:
        nearest = max(round(batch / parts), 1) * parts
        raise UserError(
            "train.batch",
            batch,
            f"must divide into {world} ranks x train.accumulate = {accumulate}; nearest: {nearest}",
        )
    rows = torch.arange(batch).reshape(accumulate, world, batch // parts)
    return [row[rank] for row in rows]


def clipped_step(optimizer: EmaInterface, clip: float, limit: Tensor | None) -> Tensor:
    """Clip to ``clip`` (0: not) and update, unless the norm is not finite or above ``limit``; returns the norm.

    The optimizer leaves out a step with a NaN in it, so one is written for a norm above the limit: that decides on
    the device.  The limit costs another pass over the gradients.
    """
    if limit is None:
        return optimizer.clip_and_step(clip or None)
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)))
    first = grads[0][(0,) * grads[0].dim()]
    first.add_(torch.zeros_like(first).masked_fill_((norm > limit).to(first.device), torch.nan))
    optimizer.clip_and_step(clip or None)
    return norm


_BACKEND = "inductor"  # of torch.compile


def compile_in_place(model: LightningDiT, what: str) -> None:
    """``off``, ``regional`` (every block; they share two graphs) or ``model``.  State-dict names stay as they are."""
    shorten_compiler_messages()
    if what == "model":
        model.compile(backend=_BACKEND)
    elif what == "regional":
        for block in model.blocks:
            block.compile(backend=_BACKEND)


class PlainEngine:
    """One process, one device."""

    rank, world, is_main = 0, 1, True

    def __init__(self, model: LightningDiT, config: Config, device: torch.device):
        train = config.train
        self.device, self._train = device, train
        self.model = prepare_model(model, config, device, train.batch // train.accumulate).train()
        self.autocast = choose_autocast(train.precision, device)
        masters = use_working_weights(self.model, config, device)
        self.optimizer = build_optimizer(
            self.model.parameters(),
            impl=train.optimizer,
            lr=train.lr,
            betas=(train.betas[0], train.betas[1]),
            weight_decay=train.weight_decay,
            ema_decay=train.ema,
        )
        if masters is not None:
            self.optimizer.init_state(masters)  # type: ignore[attr-defined]
        compile_in_place(self.model, train.compile)
        part_flops = train_flops(self.model) * (train.batch // train.accumulate)
        self._graphed: GraphedStep | None = None
        self._lr: Tensor | None = None  # read by a recorded step
        if wants_graph(train.cuda_graph, device, self.optimizer, part_flops, train.precision):
            self._lr = torch.zeros((), dtype=torch.float32, device=device)
        self._watch = to_be_watched(train.cuda_graph, part_flops, train.precision)

    def positions(self) -> list[Tensor]:
        return split_positions(self._train.batch, self.world, self.rank, self._train.accumulate)

    def forward(self, x: Tensor, tau: Tensor, y: Tensor, **options: Any) -> Any:
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return self.model(x, tau, y, **options)

    def backward(self, loss: Tensor) -> None:
        (loss / self._train.accumulate).backward()

    def step(self, lr: float | Tensor, limit: Tensor | None = None) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = clipped_step(self.optimizer, self._train.clip, limit)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def run(
        self, compute: Compute, step: int, parts: Sequence[Part], lr: float, limit: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if self._lr is None:
            return compute(step, parts), self.step(lr, limit)
        fixed = self._lr.fill_(lr)
        if self._graphed is None:
            self._graphed = GraphedStep(
                lambda step, parts: (compute(step, parts), self.step(fixed, limit)),
                self.device,
                undo=lambda: self.optimizer.zero_grad(set_to_none=True),
                careful=self._train.cuda_graph == "auto",
                watch=self._watch,
            )
        values, norm = self._graphed(step, parts)
        if self._graphed.refused:  # the next steps are as plain as any
            self._graphed = self._lr = None
        return values, norm

    @property
    def recorded(self) -> bool:
        """Whether steps are replayed from a CUDA graph."""
        return self._graphed is not None and self._graphed.replays

    def mean(self, values: Tensor) -> Tensor:
        return values

    def any(self, flag: bool) -> bool:
        return flag

    def barrier(self) -> None:
        pass

    def from_main(self, compute: Callable[[], T]) -> T:
        return compute()

    def _weights(self) -> dict[str, Tensor]:
        """The state dict with the float32 weights that the optimizer keeps for bf16 ones."""
        kept = {name: self.optimizer.state.get(p, {}).get("master") for name, p in self.model.named_parameters()}
        return {**self.model.state_dict(), **{name: value for name, value in kept.items() if value is not None}}

    def _ema(self) -> dict[str, Tensor]:
        return {**self.model.state_dict(), **ema_parameters(self.optimizer, self.model)}

    def _moments(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The optimizer's state without EMA and weights, as (tensors named ``parameter/entry``, JSON values)."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        order = [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
        tensors, numbers = {}, {}
        for index, entries in self.optimizer.state_dict()["state"].items():
            for entry, value in entries.items():
                if entry in ("ema", "master"):
                    continue
                if isinstance(value, Tensor):
                    tensors[f"{order[index]}/{entry}"] = value
                else:
                    numbers[f"{order[index]}/{entry}"] = value
        return tensors, numbers

    def first_nonfinite(self) -> str | None:
        groups = {"weight": self._weights(), "average of": self._ema(), "moment": self._moments()[0]}
        for kind, tensors in groups.items():
            # one wait for each group, not for each tensor
            finite = torch.stack(
                [tensor.isfinite().all().to(self.device) for tensor in tensors.values()]
                or [torch.tensor(True, device=self.device)]
            )
            if not bool(finite.all()):
                return f"{kind} {list(tensors)[int((~finite).nonzero()[0])]}"
        return None

    def save(self, directory: Path) -> None:
        tensors, numbers = self._moments()
        save_tensors(directory / MODEL, self._weights())
        save_tensors(directory / EMA, self._ema())
        save_tensors(directory / OPTIMIZER, tensors)
        (directory / OPTIMIZER_NUMBERS).write_text(json.dumps(numbers))

    def load(self, directory: Path) -> None:
        weights = load_tensors(directory / MODEL)
        self.model.load_state_dict(weights)
        averages = load_tensors(directory / EMA)
        entries: dict[str, dict[str, Any]] = {}
        saved = {**load_tensors(directory / OPTIMIZER), **json.loads((directory / OPTIMIZER_NUMBERS).read_text())}
        for key, value in saved.items():
            name, _, entry = key.rpartition("/")
            entries.setdefault(name, {})[entry] = value
        for name, p in self.model.named_parameters():
            if p.dtype != weights[name].dtype:  # a working weight, which needs its float32 one from the first update on
                zeros = {entry: torch.zeros_like(weights[name]) for entry in ("exp_avg", "exp_avg_sq")}
                entries[name] = {"step": torch.zeros(()), **zeros, **entries.get(name, {}), "master": weights[name]}
        for name in entries:
            entries[name]["ema"] = averages[name]
        groups = self.optimizer.state_dict()["param_groups"]
        names = {id(p): name for name, p in self.model.named_parameters()}
        order = [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
        state = {index: entries[name] for index, name in enumerate(order) if name in entries}
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def choose_engine(config: Config, here: Session) -> str:
    """``plain`` or ``deepspeed``: for ``auto``, what started this process decides, or a DeepSpeed JSON of the user's.

    Raises UserError for the plain engine under a launcher of several ranks: it would train as many separate networks.
    """
    engine = config.train.engine
    if engine == "auto":
        wanted = here.world > 1 or here.by_deepspeed or config.train.deepspeed_config
        return "deepspeed" if wanted else "plain"
    if engine == "plain" and here.world > 1:
        raise UserError("train.engine", "plain", f"is one process, the launcher started {here.world}: use deepspeed")
    return engine


def check_engine(config: Config) -> None:
    """What the engine of this run would refuse, before any work: the batch, DeepSpeed and its JSON.  UserError."""
    if choose_engine(config, session()) == "deepspeed":
        from fastasync.training.deepspeed_engine import check_deepspeed

        check_deepspeed(config, session().world)
    else:
        split_positions(config.train.batch, 1, 0, config.train.accumulate)


def build_engine(model: LightningDiT, config: Config, device: torch.device) -> Engine:
    """The engine of a run."""
    if choose_engine(config, session()) == "deepspeed":
        from fastasync.training.deepspeed_engine import DeepSpeedEngine  # takes seconds to import

        return DeepSpeedEngine(model, config, device)
    return PlainEngine(model, config, device)
