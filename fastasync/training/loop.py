"""The training loop: the order of events.  The mathematics is the objective's, the optimizer's and the model's."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from fastasync.config import Config
from fastasync.data import Latents, batch_indices, flips_by_step, training_calls
from fastasync.data.verify import damage
from fastasync.distributed import OtherRankFailed, explained_loss, rank_lost, session
from fastasync.errors import UserError
from fastasync.model import train_flops
from fastasync.schedule import Schedule
from fastasync.training import checkpoint
from fastasync.training.build import build_model, build_objective, choose_device, choose_ops
from fastasync.training.engine import build_engine
from fastasync.training.graph import Part
from fastasync.training.interrupt import Interrupted, StopSignal, only_process
from fastasync.training.metrics import MetricsLog, Stopwatch, Tally, TallyReading, peak_flops, peak_memory
from fastasync.training.out_of_memory import explained_training
from fastasync.training.repa import OnlineFeatures, repa_features
from fastasync.training.start import load_starting_weights
from fastasync.training.step import step_function
from fastasync.training.watchdog import Watchdog

SKIP_LIMIT = 3  # steps in a row whose gradient may be non-finite


class TrainingError(UserError):
    """Training cannot go on; the last good checkpoint is intact."""

    exit_code = 3


class TrainResult(NamedTuple):
    """``step``: steps done.  ``checkpoint``: the last one.  ``resumed_from``: the step this call started at (0: new).
    ``record``: the last metrics of this call, or None.  ``messages``: what was said on the way."""

    step: int
    checkpoint: Path
    resumed_from: int
    record: dict[str, Any] | None
    messages: list[str]


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up over ``train.warmup`` steps, then constant.  ``step`` counts from 0."""
    return config.train.lr * min(1.0, (step + 1) / max(config.train.warmup, 1))


def train(
    config: Config,
    latents: Latents,
    schedule: Schedule,
    out_dir: str | Path,
    *,
    statistics_fingerprint: str,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> TrainResult:
    """Train along ``schedule`` to ``config.train.steps``, in ``out_dir``; continues what is there.

    Writes ``checkpoints/``, ``metrics.jsonl``, ``metrics.csv`` and ``tensorboard/``.  ``statistics_fingerprint`` names
    the statistics that the latents were normalised with; a checkpoint of others is refused.  ``say`` receives messages
    (default: stderr).
    A CPU run that was stopped at any moment and resumed ends bit for bit where an uninterrupted one does.

    Raises:
        UserError: the data or what is in ``out_dir`` does not fit the configuration, the disk is full, the device
            is out of memory, or the verification of ``latents`` has found a damaged shard.
        TrainingError: three steps in a row had a non-finite gradient, or a weight became non-finite.
        Interrupted: SIGTERM or SIGINT; a checkpoint was saved (exit code 75).
    """
    out, settings, seed = Path(out_dir), config.train, config.data.seed
    root, messages, record = out / checkpoint.FOLDER, [], None
    hashed = hasattr(latents, "verification")
    device = choose_device(settings.device)
    ops, objective = choose_ops(config.model.kernels, device), build_objective(config)
    check_data(config, latents)
    features_of = repa_features(config, latents)

    def show(line: str) -> None:
        (say or (lambda text: tqdm.write(text, file=sys.stderr)))(line)

    def tell(line: str) -> None:
        messages.append(line)
        if session().is_main:
            show(line)

    last_good: Path | None = None
    step = 0
    with ExitStack() as stack:

        def newest() -> Path | None:
            """A rank that is lost while all save leaves a checkpoint of this step that nobody has told of."""
            return checkpoint.saved_at(root, step) or last_good

        def stuck() -> None:
            print(f"fastasync: error: {rank_lost(newest(), 'told to stop, in one call since')}", file=sys.stderr)

        stack.enter_context(explained_loss(newest))
        if device.type == "cuda":  # TF32 where autocast leaves float32; sampling after it must not depend on it
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("high")
        torch.manual_seed(seed)
        model = build_model(config)
        started_from = load_starting_weights(model, out)
        stack.enter_context(explained_training(config, model, device))
        engine = build_engine(model, config, device)

        def open_folder() -> Path | None:
            stack.enter_context(only_process(out))
            checkpoint.clean(root)
            return checkpoint.resumable(root, tell)

        # --- continue where the newest complete checkpoint is: the main rank looks, for all -------------------------
        last_good = engine.from_main(open_folder)
        tally = Tally([*_names(config), "grad_norm"], device, settings.max_norm_ratio)
        if last_good is not None:
            state = checkpoint.read_state(last_good)
            checkpoint.check_same_run(state, config, schedule, statistics_fingerprint, last_good)
            step = state.step
            if step > settings.steps:
                raise UserError("train.steps", settings.steps, f"the run is at step {step} already; give at least that")
            if step == settings.steps:
                return TrainResult(step, last_good, step, None, messages)
            engine.load(last_good)
            tally.load(state.tally)
            checkpoint.restore_random(state.random)
            tell(f"resumed from {last_good}")
        elif started_from:
            tell(f"a new run, from the weights in {started_from}")
        start, watch = step, Stopwatch(settings.batch)

        log = None
        if engine.is_main:
            log = stack.enter_context(MetricsLog(out, step, project=settings.wandb, facts=config.to_dict()))
        hidden = not (progress and engine.is_main)
        bar = stack.enter_context(tqdm(total=settings.steps, initial=step, unit="step", disable=hidden))
        stop = stack.enter_context(StopSignal(engine.world > 1, stuck))
        watchdog = stack.enter_context(Watchdog(settings.stall_minutes, show, engine.rank))
        places = [(where, where.to(device)) for where in engine.positions()]
        flops, peak = train_flops(engine.model), peak_flops(device)
        # what is on disk is gathered ahead, in the order in which it is needed
        calls = training_calls([where for where, _ in places], settings.batch, len(latents), seed, config.data.flip)
        needed = (step * len(places), settings.steps * len(places))
        if hasattr(latents, "prefetch"):
            latents.prefetch(calls, *needed)
        if isinstance(features_of, OnlineFeatures):
            stack.enter_context(features_of.reading(calls, *needed))

        def halt(what: str, terms: dict[str, float | None]) -> TrainingError:
            numbers = {"learning rate": learning_rate(config, step - 1), **terms}
            return TrainingError(
                f"training stopped at step {step}",
                what + " (" + ", ".join(f"{key} {value}" for key, value in numbers.items()) + ")",
                f"the last good checkpoint is {last_good or 'none yet'}: run again to continue from it, "
                "or start over with a lower train.lr or with train.clip"
                + (f"; or damaged latents: `fastasync check-latents {config.data.root}`" if hashed else ""),
            )

        def damaged() -> BaseException:
            """Of a shard that was trained on: nothing is saved of the steps since the last checkpoint."""
            found = damage(latents)
            if found is None:  # another rank's, which reports it
                return OtherRankFailed(UserError.exit_code)
            kept = f"training stopped at step {step}, the last checkpoint is {last_good or 'none yet'}"
            return UserError(found.field, found.value, f"{found.remedy}; {kept}")

        def inspect() -> TallyReading:
            """Look at what the steps since the last time did.  Waits for the device."""
            reading = TallyReading(tally.names, engine.mean(tally.values).tolist())
            if reading.skipped_in_a_row >= SKIP_LIMIT:
                what = f"{reading.skipped_in_a_row} steps in a row, from step {reading.first_skipped} on, had"
                offending = dict(zip(tally.names, tally.offending.tolist()))
                raise halt(f"{what} a gradient that is not finite{_or_too_large(config)}; the last one:", offending)
            return reading

        def save() -> Path:
            reading = inspect()
            name = engine.first_nonfinite()
            if name is not None:
                raise halt(f"{name} is not finite", dict(reading.means))
            if log is not None:
                log.sync()
            return checkpoint.save(
                root,
                checkpoint.run_state(step, config, schedule, statistics_fingerprint, reading.values),
                engine,
                keep=settings.keep_checkpoints,
                milestone_every=settings.milestone_every,
            )

        compute = step_function(engine, config, objective, ops, [at_model for _, at_model in places])

        clocks = [
            objective.times_by_step(schedule, seed=seed, samples=where, total=settings.batch) for where, _ in places
        ]
        flips_at = [flips_by_step(seed, where) for where, _ in places]

        while step < settings.steps:
            # --- one step: `step` keys data order, noise, times, flips and label dropout ----------------------------
            order = batch_indices(step, settings.batch, len(latents), seed)
            parts = []
            for (where, _), times_at, flips_of in zip(places, clocks, flips_at):
                indices = order[where]
                flips = flips_of(step) if config.data.flip else None
                with watch.waiting():
                    batch = latents.batch(indices, flips)
                    features = None if features_of is None else features_of(indices, flips)
                z, y = (part.to(device, non_blocking=True) for part in batch)
                features = None if features is None else features.to(device, non_blocking=True)
                times = times_at(step).to(device)
                parts.append(Part(z, y, times.tau, times.weight, features))
            values, norm = engine.run(compute, step, parts, learning_rate(config, step), tally.limit)
            step += 1
            tally.add([values, norm], step)
            watch.steps += 1
            watchdog.beat(step)
            bar.update()

            # --- what is not done at every step ---------------------------------------------------------------------
            if step % settings.log_every == 0 or step == settings.steps:
                reading = inspect()
                rate, data_share = watch.read()
                record = {
                    "step": step,
                    **reading.means,
                    "lr": learning_rate(config, step - 1),
                    "skipped": reading.skipped,
                    "images_per_second": rate,
                    "data_share": data_share,
                    "mfu": None if peak is None else rate * flops / (peak * engine.world),
                    "memory_gib": peak_memory(device),
                }
                tally.restart()
                if log is not None:
                    log.write(record)
                bar.set_postfix(loss=reading.means["loss"], images_per_s=round(rate, 1), refresh=False)
            stopping = engine.any(stop.received is not None or damage(latents) is not None)
            if stopping and engine.any(damage(latents) is not None):
                raise damaged()
            if stopping or step == settings.steps or _due(config, step):
                began = time.perf_counter()
                with stop.patient():
                    last_good = save()
                watch.leave_out(began)
                watchdog.beat(step)
            if stopping:
                assert last_good is not None  # saved just now
                tell(f"stopped by a signal at step {step}; saved {last_good}; run the same command again to continue")
                raise Interrupted(step, last_good)
    assert last_good is not None  # saved at the last step
    return TrainResult(step, last_good, start, record, messages)


def _or_too_large(config: Config) -> str:
    ratio = config.train.max_norm_ratio
    return f" or more than {ratio:g} times the median of those before (train.max_norm_ratio)" if ratio else ""


def _due(config: Config, step: int) -> bool:
    every = (config.train.checkpoint_every, config.train.milestone_every)
    return any(n and step % n == 0 for n in every)


def _names(config: Config) -> list[str]:
    return ["loss", *(f"loss/{name}" for name in config.representations.names), "cosine", "repa"]


def check_data(config: Config, latents: Latents) -> None:
    """Raise UserError unless the latents fit the configuration."""
    representations, count = config.representations, len(latents)
    if config.train.batch > count:
        raise UserError("train.batch", config.train.batch, f"is larger than the set: give at most {count}")
    if latents.classes != config.model.classes:
        raise UserError("model.classes", config.model.classes, f"the latents have {latents.classes} classes")
    z, _ = latents.batch(torch.zeros(1, dtype=torch.int64))
    expected = (sum(representations.channels), representations.grid, representations.grid)
    if tuple(z.shape[1:]) != expected:
        raise UserError(
            "representations.channels",
            f"C, H, W = {expected}",
            f"the latents are {tuple(z.shape[1:])}: prepare them again",
        )
