"""The work itself: encoders once, probes once, one line of training after another, samples scored as they are made."""

from __future__ import annotations

import glob
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.science.specs import LEARNED, MEMBERS, Spec, Study, Way, nfe, sampler
from bench.science.table import locked
from fastasync import sampling
from fastasync.config import Config
from fastasync.densities import DENSITIES
from fastasync.errors import UserError
from fastasync.evaluation import FeatureExtractor, FeatureSet, evaluate, frechet_distance
from fastasync.evaluation.protocol import hardware_name
from fastasync.files import load_tensors, write_json
from fastasync.inputs import Inputs, Reference, open_inputs
from fastasync.probe import LossSurface, ProbeResult, learn_schedule, line_loss, probe_plan
from fastasync.probe.generation import gaussian_statistics
from fastasync.probe.learn import ERRORS, NETWORK, NETWORK_FACTS, chosen_beta, probe_loss_weights, search_method
from fastasync.probe.network import autocast, build_probe
from fastasync.run import Run
from fastasync.schedule import Schedule, kinetic_energy, load_schedule, named_schedule, save_schedule
from fastasync.stages import planned_flops
from fastasync.training import build_engine, build_model, checkpoint, load_model, train
from fastasync.training.build import choose_autocast, choose_device, choose_ops

Say = Callable[[str], None]
SECONDS = "seconds.json"  # what a line of training has taken, and until which step


class Trained(NamedTuple):
    """A line of training at its last step: its checkpoints' folder, its schedule, seconds (compilation included; None
    where a process that was killed did not say its own)."""

    folder: Path
    schedule: Schedule
    seconds: float | None


class Score(NamedTuple):
    """Figures of one set of samples, the evaluations that each image took, and what it cost."""

    figures: dict[str, float]
    evaluations: float
    sample_seconds: float
    score_seconds: float


class Ranked(NamedTuple):
    """What a probe says of one schedule: Frechet distance of its samples in the encoder's features, and B's J."""

    schedule: str
    distance: float
    objective: float


class Workshop:
    """Everything that runs share.  ``out``: what is kept (schedules); ``work``: what may be thrown away."""

    def __init__(self, study: Study, out: Path, work: Path, say: Say = print):
        self.study, self.out, self.work, self.say = study, out, work, say
        self.device = choose_device(study.common().train.device)
        self._inputs: dict[str, Inputs] = {}
        self._scoring: dict[str, tuple[FeatureExtractor, Reference]] = {}
        self._compiled: tuple[str, str] | None = None

    @cached_property
    def hardware(self) -> str:
        """As every row names it."""
        return hardware_name(self.device)

    def inputs(self, representations: str) -> Inputs:
        """Latents and encoders, prepared once; their seed is the same for every run."""
        if representations not in self._inputs:
            config = self.study.common(representations)
            run = Run(self.work / "inputs", config, self.work / f"prepared-{representations}")
            with locked(self.work / "inputs.lock"):
                self._inputs[representations] = open_inputs(run, self.device, self.say)
        return self._inputs[representations]

    def scoring(self, representations: str) -> tuple[FeatureExtractor, Reference]:
        """What scores samples, never what selects schedules."""
        if representations not in self._scoring:
            inputs = self.inputs(representations)
            extractor = inputs.extractor()
            with locked(self.work / "inputs.lock"):
                self._scoring[representations] = extractor, inputs.reference(extractor)
        return self._scoring[representations]

    # --- schedules ------------------------------------------------------------------------------------------------

    @staticmethod
    def schedule_path(out: Path, spec: Spec) -> Path:
        """Where a learned schedule is kept."""
        name = f"{spec.schedule}-{spec.probe}-{spec.representations}-seed{spec.seed}.json"
        return out / "schedules" / name.replace(" ", "_")

    def schedule_file(self, spec: Spec) -> Path:
        """The same in this study's folder."""
        return self.schedule_path(self.out, spec)

    def schedule(self, spec: Spec) -> Schedule:
        """The schedule of a line of training; what is learned is learned once and kept."""
        reps = self.study.common(spec.representations).representations
        if member := MEMBERS.get(spec.schedule.partition(":")[0]):
            return member(spec.schedule, reps.names, reps.roles)
        if spec.schedule not in LEARNED:
            return named_schedule(spec.schedule, reps.names, reps.roles)
        path = self.schedule_file(spec)
        if not path.exists():
            found = self.probe(spec.schedule, spec.probe, spec.seed, spec.representations)
            save_schedule(found.schedule, path)
        return load_schedule(path, reps.names)

    def probe_folder(self, estimator: str, variant: str, seed: int, representations: str) -> Path:
        """Where a probe is kept."""
        return self.work / "probes" / f"{estimator}-{variant}-{representations}-seed{seed}".replace(" ", "_")

    def probe(self, estimator: str, variant: str, seed: int, representations: str = "pair") -> ProbeResult:
        """A probe's result, learned once."""
        config = self.study.probe_config(estimator, variant, seed, representations)
        inputs, folder = self.inputs(representations), self.probe_folder(estimator, variant, seed, representations)
        with locked(folder.with_suffix(".lock")):
            return learn_schedule(
                config,
                inputs.latents,
                planned_flops=planned_flops(config),
                score=inputs.scorer() if estimator == "C" else None,
                device=self.device,
                out_dir=folder,
                progress=sys.stderr.isatty(),
            )

    def rank(self, variant: str, seed: int, names: Sequence[str]) -> tuple[ProbeResult, list[Ranked]]:
        """Every named schedule, and the probe's own choice, by the probe of C: the same noise and labels for each."""
        result = self.probe("C", variant, seed)
        config, inputs = self.study.probe_config("C", variant, seed), self.inputs("pair")
        scorer = inputs.scorer()
        assert scorer is not None  # images have one
        network, surface = self._probe_network(config, "C", variant, seed)
        reps, density = config.representations, DENSITIES[config.objective.density]
        lam, beta = probe_loss_weights(config), chosen_beta(config.probe.beta)
        schedules = {name: named_schedule(name, reps.names, reps.roles) for name in names} | {"C": result.schedule}
        middle = next(row for row in result.sweep if row["beta"] == beta)
        sample, rows = config.sample, []
        way = Way(search_method(config), config.probe.sampling_steps, sample.grid_power, sample.last_step)

        def velocity(x: Tensor, tau: Tensor, y: Tensor) -> Tensor:
            with autocast(self.device):
                return network(x, tau, y)

        for name, schedule in schedules.items():
            features = []
            for indices in torch.arange(self.study.rank_samples).split(self.study.sample_batch):
                z = self.latents(config, velocity, schedule, indices, way, config.probe.seed)
                features.append(scorer.features(z).double().cpu())
            distance = frechet_distance(gaussian_statistics(torch.cat(features)), scorer.reference)
            with torch.no_grad():
                energy = kinetic_energy(schedule)
                objective = float(line_loss(surface, schedule, density, lam) + beta * energy)
            rows.append(Ranked(name, distance, objective))
        rows.append(Ranked("B", math.nan, float(middle["objective"])))
        return result, rows

    def _probe_network(self, config: Config, estimator: str, variant: str, seed: int) -> tuple[Any, LossSurface]:
        folder = self.probe_folder(estimator, variant, seed, "pair")
        remedy = f"remove {folder} and run the same command again"
        tensors = load_tensors(folder / NETWORK, read_json(folder / NETWORK_FACTS, remedy)["sha256"], remedy)
        surface = LossSurface.fit(*(tensors.pop(name) for name in ERRORS))
        network = build_probe(config, self.device)
        network.load_state_dict(tensors)
        return network.eval().requires_grad_(False), surface

    def probe_steps(self, variant: str) -> int:
        """Training steps of C's probe of this variant, in images counted as the main run's steps."""
        config = self.study.probe_config("C", variant, 0)
        steps = probe_plan(config, planned_flops(config)).steps
        return math.ceil(steps * config.probe.batch / config.train.batch)

    # --- training and scoring ----------------------------------------------------------------------------------------

    def run_folder(self, spec: Spec) -> Path:
        """Where a line of training is kept until it is scored."""
        return self.work / "runs" / str(spec).replace(" ", "_").replace(":", "-").replace(",", "")

    def train(self, spec: Spec, steps: Sequence[int]) -> Trained:
        """Train to the last of ``steps``, keeping a checkpoint at each; goes on from what is there."""
        schedule = self.schedule(spec)
        config = self.study.config(spec, max(steps), math.gcd(*steps))
        inputs, folder = self.inputs(spec.representations), self.run_folder(spec)
        kept = _checkpoints(folder)
        if set(steps) <= kept:  # by a longer run, too
            spent = _seconds(folder, max(kept))
            return Trained(folder, schedule, spent and spent * max(steps) / max(kept))
        if max(kept, default=0) > max(steps):  # a longer run that did not keep them, or was cut off: beside it
            folder = folder.with_name(f"{folder.name}_to_{max(steps)}")
        if spec.start == "probe" and not (folder / checkpoint.FOLDER).exists():
            self._start_from_probe(spec, config, schedule, folder)
        shape = (spec.size, spec.representations)
        if self._compiled not in (None, shape):
            torch.compiler.reset()  # another network: its graphs would count against the limit of recompilations
        self._compiled = shape
        begun = max(_checkpoints(folder), default=0)
        before = _seconds(folder, begun)
        start = time.perf_counter()
        try:
            train(
                config,
                inputs.latents,
                schedule,
                folder,
                statistics_fingerprint=inputs.statistics_fingerprint,
                progress=sys.stderr.isatty(),
                say=self.say,
            )
        finally:  # of an interrupted run, too: the next process adds its own
            reached = max(_checkpoints(folder), default=0)
            if reached > begun:
                before = None if before is None else before + time.perf_counter() - start
                write_json(folder / SECONDS, {"seconds": before, "step": reached})
        return Trained(folder, schedule, before)

    def _start_from_probe(self, spec: Spec, config: Config, schedule: Schedule, folder: Path) -> None:
        """A checkpoint of step 0 whose weights, and their averages, are the probe's: training goes on from it."""
        self.probe("C", spec.probe, spec.seed)
        network, _ = self._probe_network(
            self.study.probe_config("C", spec.probe, spec.seed), "C", spec.probe, spec.seed
        )
        model = build_model(config)
        model.load_state_dict(network.state_dict())
        engine = build_engine(model, config, self.device)
        tally = [0.0] * (len(config.representations.names) + 4 + 5)  # loss, each, cosine, repa, norm; the skips
        fingerprint = self.inputs(spec.representations).statistics_fingerprint
        state = checkpoint.run_state(0, config, schedule, fingerprint, tally)
        checkpoint.save(folder / checkpoint.FOLDER, state, engine, keep=1)

    def score(self, spec: Spec, trained: Trained, step: int, name: str) -> Score:
        """Figures of the run's samples at one step by one sampler."""
        config, inputs = self.study.config(spec), self.inputs(spec.representations)
        extractor, reference = self.scoring(spec.representations)
        loaded = load_model(trained.folder / checkpoint.FOLDER / f"step_{step:08d}", device=self.device)
        dtype, calls = choose_autocast(config.train.precision, self.device), 0

        def velocity(x: Tensor, tau: Tensor, y: Tensor) -> Tensor:
            nonlocal calls
            calls += len(x)
            with torch.autocast(self.device.type, dtype or torch.float32, enabled=dtype is not None):
                return loaded.model(x, tau, y)

        features, making, scoring = [], 0.0, 0.0
        for indices in torch.arange(config.sample.count).split(config.sample.batch):
            start = time.perf_counter()
            z = self.latents(config, velocity, loaded.schedule, indices, sampler(name), config.sample.seed)
            images = inputs.decode(z).cpu()  # waits for the device
            making += time.perf_counter() - start
            features.append(extractor(images))
            scoring += time.perf_counter() - start
        scoring -= making
        start = time.perf_counter()
        found = FeatureSet(torch.cat(features), extractor.fingerprint)
        size = min(1000, config.sample.count)
        result = evaluate(found, reference.features, extractor, config.evaluate.metrics, kid_subset_size=size)
        scoring += time.perf_counter() - start
        figures = {metric: float(result[metric]) for metric in config.evaluate.metrics}
        return Score(figures, calls / config.sample.count, making, scoring)

    def latents(
        self, config: Config, velocity: Any, schedule: Schedule, indices: Tensor, way: Way, seed: int
    ) -> Tensor:
        """Latents of samples with balanced labels; ``seed``: of the noise."""
        reps = config.representations
        return sampling.generate_latents(
            velocity,
            schedule,
            indices,
            sampling.sample_labels(indices, range(config.model.classes), "balanced", seed),
            channels=reps.channels,
            side=reps.grid,
            grid=sampling.time_grid(schedule, way.intervals, way.power, way.last_step),
            method=way.method,
            seed=seed,
            device=self.device,
            ops=choose_ops(config.model.kernels, self.device),
        )

    def claim(self, job: object) -> Path:
        """The lock that whoever works on a job holds."""
        return self.work / "claims" / str(job).replace(" ", "_").replace("/", "-")

    def discard(self, spec: Spec) -> None:
        """Remove a scored run's checkpoints; its row has everything."""
        folder = self.run_folder(spec)
        for each in (folder, *folder.parent.glob(f"{glob.escape(folder.name)}_to_*")):
            shutil.rmtree(each, ignore_errors=True)


def read_json(path: Path, remedy: str) -> Any:
    """What a JSON file of the study's holds.  Raises UserError with the remedy where it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(str(path), f"cannot be read ({error})", remedy) from None


def _checkpoints(folder: Path) -> set[int]:
    """The steps that a line of training has checkpoints of."""
    return {step for step, _ in checkpoint.steps(folder / checkpoint.FOLDER)}


def _seconds(folder: Path, step: int) -> float | None:
    """What was spent until the checkpoint of ``step``; None where a process that was killed did not say it."""
    if not step:  # nothing was trained yet
        return 0.0
    path = folder / SECONDS
    if not path.exists():
        return None
    remedy = f"remove {folder} (it is trained again) and run the same command again"
    known = read_json(path, remedy)
    try:
        return known["seconds"] if known["step"] >= step else None
    except (KeyError, TypeError):
        raise UserError(str(path), "holds no seconds and step", remedy) from None


def evaluations_of(name: str, measured: float | None = None) -> float:
    """Function evaluations for estimates: the fixed number, or for dopri5 what was measured, or 100."""
    return nfe(name) or measured or 100.0
