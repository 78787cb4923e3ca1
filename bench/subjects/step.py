"""A whole training step (times, noising, network, loss, backward, clip, AdamW, EMA): PyTorch compiled, and ours.

Before a plan is timed, the gradient that its variants give the patch embedding is compared, and the loss that they end
the warm-up with: recorded steps give the latter from the recording.

L's MLPs are 2,730 wide, a width that GEMMs are slow at.  PyTorch's variants compute them as published, since that is
what its users have; ours compute them 2,752 wide, with zeros (fastasync_kernels.zeros).  A row's note says the width.
"""

from __future__ import annotations

import gc
from typing import NamedTuple

import torch
from torch import Tensor

from bench.harness import Bench, WrongResult, summarize
from bench.workload import Work, backends, configuration, latents, learned_schedule, make_work
from fastasync.errors import UserError
from fastasync.model import train_flops

# size, batch, variants; the order is that of importance
PLANS = (
    ("XL", 256, ("pytorch regional", "ours regional", "ours fp8")),
    ("XL", 256, ("ours fp8 graph",)),  # alone: a recording keeps its activations' memory (small ones' fit beside)
    ("XL", 256, ("ours regional graph",)),
    ("cifar10", 256, ("ours graph uncompiled", "ours graph", "pytorch whole", "ours whole")),
    ("B", 256, ("pytorch regional", "ours regional", "ours regional graph")),
    ("B", 256, ("ours regional", "ours fp8")),
    ("XL", 256, ("pytorch whole", "ours whole")),
    ("S", 256, ("pytorch regional", "ours regional", "ours regional graph")),
    ("L", 256, ("pytorch regional", "ours regional")),
    ("XL", 256, ("ours regional", "ours regional plain MLP")),
    ("L", 256, ("ours fp8",)),
)
# How far a variant may be from the plan's first one, as a share: gradient and loss.  Three to six times what rounding
# does to 28 blocks of width 64 on a CPU, against float32 (bf16: 0.8 % and 0.02 %; fp8: 4.3 % and 0.3 %; by a script
# that was not kept).  There queries of 1.1 times their size make 4.7 % of gradient, a SwiGLU gradient of 0.9 times its
# size 3.6 %, GELU in SwiGLU's place 8.3 %, no RoPE 26 %.  So fp8's bound finds coarse faults only: its casts are
# compared bit by bit in the subject fp8_casts.
APART = {"bf16": (0.03, 1e-3), "fp8": (0.13, 1e-2)}


class Start(NamedTuple):
    """A variant's warm-up: the gradient of the patch embedding in its first step, the terms of its last one."""

    gradient: Tensor
    terms: Tensor


def warm_up(work: Work) -> Start:
    """Compiles, tunes, makes the optimizer's state, records; the learning rate is zero, and the weights stay.

    The same step each time: a schedule that is new begins with the first batch.  The patch embedding's gradient comes
    through everything that a step computes, forward and backward.
    """
    gradients: list[Tensor] = []
    weight = work.engine.model.x_embedder.proj.weight
    hook = weight.register_hook(lambda gradient: gradients.append(gradient.detach().float().clone()))
    try:
        work.step(learned_schedule(work.config), 0.0)
    finally:
        hook.remove()
    for _ in range(4):
        terms = work.step(learned_schedule(work.config), 0.0)
    if not bool(torch.isfinite(terms).all()):
        raise ArithmeticError(f"the loss is {terms.tolist()}")
    return Start(gradients[0], terms.clone())


def compare(bench: Bench, label: str, starts: dict[str, Start], fp8: bool) -> None:
    """The last variant's first gradient, and its loss, with those of the first variant.  Raises WrongResult."""
    first, *_, last = starts
    exact, found = starts[first], starts[last]
    gradient = float((found.gradient - exact.gradient).norm() / exact.gradient.norm())
    loss = abs(float(found.terms[0] / exact.terms[0]) - 1)
    told = f"{label}: gradient {gradient:.2%} and loss {loss:.3%} from {first}'s"
    bench.say(f"  {told}")
    most, at_loss = APART["fp8" if fp8 else "bf16"]
    if not (gradient <= most and loss <= at_loss):  # NaN included
        raise WrongResult(f"{told}, at most {most:.0%} and {at_loss:.1%} are allowed")


def build(bench: Bench, subject: str, size: str, batch: int, names: tuple[str, ...]) -> dict[str, Work]:
    """The variants' steps, on shared parameters; what cannot run here is left out and said."""
    works: dict[str, Work] = {}
    starts: dict[str, Start] = {}
    data = None
    for name in names:
        label = f"{subject} {size} {name}"
        if bench.time_is_up(label):
            break
        try:
            config = configuration(size, batch, name)
            data = data or latents(config, bench.device)
            work = make_work(config, bench.device, data, list(works.values()))
            if works and config.model.mlp == "plain" and "quack" not in map(chosen_mlp, works.values()):
                raise UserError("model.mlp", "plain", "no other variant has another")
            starts[name] = warm_up(work)
        except UserError as error:
            bench.skip(label, str(error))
            continue
        except Exception as error:  # out of memory, a compiler's failure: one variant must not end the session
            bench.skip(label, f"{type(error).__name__}: {str(error)[:200]}")
            continue
        works[name] = work
        if len(works) > 1:
            compare(bench, label, starts, any(each.config.train.precision == "fp8" for each in works.values()))
    return works


def chosen_mlp(work: Work) -> str:
    return work.engine.model.chosen_mlp


def recorded(name: str, work: Work) -> str:
    """What ``train.cuda_graph=auto`` decided, for a row's note."""
    return "" if "auto" not in name else "recorded" if work.engine.recorded else "not recorded"


def peak_gib(bench: Bench, call) -> float | None:  # type: ignore[no-untyped-def]
    """GiB that one call of ``call`` needs at its peak, weights and optimizer included."""
    if bench.device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def asked(bench: Bench) -> list[tuple[str, int, tuple[str, ...]]]:
    """The plans of the sizes that were asked for, or the variants that were, at each of those sizes."""
    plans = [plan for plan in PLANS if not bench.sizes or plan[0] in bench.sizes]
    if not bench.variants:
        return plans
    return [(size, 256, tuple(bench.variants)) for size in dict.fromkeys(size for size, _, _ in plans)]


def run(bench: Bench) -> None:
    small = (("tiny", 8, ("pytorch eager", "ours eager", "ours fp8", "ours graph")),)  # compiling for a CPU is slow
    for size, batch, names in small if bench.small else asked(bench):
        batch = bench.batch or batch
        if bench.time_is_up(f"step {size} {', '.join(names)}"):
            continue
        works = build(bench, "step", size, batch, names)
        calls = {}
        for name, work in works.items():
            schedule = learned_schedule(work.config)
            calls[name] = lambda work=work, schedule=schedule: work.step(schedule)
        if not calls:
            continue
        # several variants hold several optimizers' states, a replay allocates nothing: such peaks mean nothing (see the
        # subject memory)
        alone = len(calls) == 1 and not any("graph" in name or "auto" in name for name in calls)
        memory = {name: peak_gib(bench, call) if alone else None for name, call in calls.items()}
        # two variants' activations do not fit side by side: the first steps of a turn pay for memory, and are not timed
        free = torch.cuda.empty_cache if bench.device.type == "cuda" else None
        times = bench.interleaved(calls, rounds=min(bench.rounds, 4), warm=2, inner=5, before=free)
        for name, work in works.items():
            model, reps = work.engine.model, work.config.representations
            bench.add(
                *("step", size, name, f"batch {batch}, {sum(reps.channels)}x{reps.grid}x{reps.grid}"),
                *(str(work.config.train.precision), summarize(times[name])),
                flops=train_flops(model) * batch,
                images=batch,
                gib=memory[name],
                note="; ".join(filter(None, (backends(model), recorded(name, work)))),
            )
        del works, calls
        torch._dynamo.reset()
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
