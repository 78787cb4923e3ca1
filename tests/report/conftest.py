"""A run directory as the stages leave it, made in milliseconds: real schedules and figures, invented numbers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastasync.config import Config, apply_settings
from fastasync.evaluation import save_figures
from fastasync.evaluation.protocol import Figure, Protocol
from fastasync.files import write_json
from fastasync.presets import preset
from fastasync.probe import ProbeResult
from fastasync.run import Run
from fastasync.schedule import ConvexSchedule, PowerSchedule, Schedule, named_schedule, save_schedule

FACTOR = {"learned": 0.72, "synchronous": 1.0, "offset:0.3": 0.8}


def protocol(name: str, schedule: Schedule, nfe: float, **changes) -> Protocol:
    fields = dict(
        samples=40, reference="digits-train", reference_count=1500, reference_fingerprint="ab" * 32,
        extractor="digits-classifier", extractor_fingerprint="cd" * 32, schedule=name,
        schedule_fingerprint=schedule.fingerprint, integrator="heun", function_evaluations=nfe, guidance="none",
        labels="balanced", precision="fp32", seed=0, checkpoint_step=700, ema=0.99, decode="texture to uint8",
        hardware="CPU <test>", versions={"torch": "2.13.0"}, date="2026-06-01",
    )  # fmt: skip
    return Protocol(**{**fields, **changes})


def learned_schedule(config: Config) -> Schedule:
    reps = config.representations
    if len(reps.names) == 2:
        return PowerSchedule(reps.names, (3.0, 1.0), 0.1)
    generator = np.random.default_rng(0)
    return ConvexSchedule(reps.names, reps.roles, generator.normal(size=(len(reps.names), 8)).tolist())


def probe_result(config: Config, schedule: Schedule, oracle: bool = True) -> ProbeResult:
    """What estimator C leaves: candidates, a sweep, a surface for K = 2."""
    names = config.representations.names
    rows = [
        {
            "label": label, "samples": samples, "distance": distance, "lead": lead,
            "history": [{"samples": samples, "distance": distance}], "schedule": schedule.to_json(),
        }
        for label, samples, distance, lead in (
            ("power 3/1 floor 0.1", 800, 2.9023, 0.35), ("offset <0.3>", 800, 3.2177, 0.3),
            ("synchronous", 100, 4.1, 0.0),
        )
    ]  # fmt: skip
    sweep = [
        {
            "beta": beta, "objective": 1.2 + beta, "loss": 1.2, "kinetic_energy": 1.3, "lead": 0.4, "moved": moved,
            "jump": bool(moved and moved > 0.25), "reached": {"even": 1.3}, "schedule": schedule.to_json(),
        }
        for beta, moved in ((0.01, None), (0.03, 0.31), (0.1, 0.05))
    ]  # fmt: skip
    diagnostics = {
        "curl": [
            {"pair": [names[0], names[-1]], "integral": -0.0421, "sign": -1, "first": names[0], "same_sign": 0.93}
        ],
        "jumped": True,
        "noise": 0.0871,
        "label": "power 3/1 floor 0.1",
        "method": "heun",
        "steps_of_sampler": 10,
        "chosen": {
            "objective": 1.234, "loss": 1.2, "kinetic_energy": 1.357, "beta": 0.03,
            "lam": [1.0] + [0.0] * (len(names) - 1), "lead": schedule.lead(),
        },
    }  # fmt: skip
    surface = {}
    if len(names) == 2:
        axis = np.linspace(0, 1, 33)
        texture, semantic = np.meshgrid(axis, axis, indexing="ij")
        first = 0.25 + 1.6 * texture**2 * (1 - 0.7 * semantic) + 0.6 * (1 - semantic) ** 2
        second = 0.3 + 1.4 * semantic**2 * (1 - 0.5 * texture)
        surface = {"tau": axis, "errors": np.stack([first, second], -1)}
        if oracle:
            path = [[0, 0], [0.0, 0.45], [0.2, 0.45], [0.2, 0.8], [0.5, 0.8], [0.5, 1.0], [1, 1]]
            diagnostics["oracle"] = {"value": 1.1, "path": path, "schedule": {}}
    budget = {
        "label": "probe.budget", "limit_flops": 4.0e12, "spent_flops": 3.6e12, "share_used": 0.9,
        "flops": {"training": 2.8e12, "surface": 0.1e12, "sampling": 0.7e12},
        "seconds": {"training": 9.1, "surface": 0.4, "minimising": 2.0, "sampling": 4.2}, "total_seconds": 15.7,
    }  # fmt: skip
    return ProbeResult(schedule, "C", diagnostics, rows, sweep, budget, surface)


def fill(run: Run, seed: int, size: int = 8, classes: int = 10, records: int = 35, samples: int = 40) -> None:
    """Everything that the stages write for one run."""
    config, name = run.config, run.config.schedule.name
    reps = config.representations
    schedule = learned_schedule(config) if name == "learned" else named_schedule(name, reps.names, reps.roles)
    if name == "learned":
        probe_result(config, schedule).save(run.probe_folder, "fingerprint")
    save_schedule(schedule, run.schedule_file)
    random = np.random.default_rng(seed)
    lines = []
    for i in range(1, records + 1):
        losses = {
            f"loss/{rep}": 0.3 + (1 + k) * np.exp(-i / 6) + 0.01 * random.normal() for k, rep in enumerate(reps.names)
        }
        record = {"step": 20 * i, "loss": sum(losses.values()), **losses, "cosine": 0.0, "repa": 0.0}
        record |= {"grad_norm": 0.5 + 1 / i + 0.1 * random.random(), "lr": 1e-3, "skipped": 0, "mfu": None}
        lines.append(json.dumps(record | {"images_per_second": 900 + 50 * random.normal(), "memory_gib": 1.0}))
    (run.path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 7')  # training is writing the next
    figures = []
    for nfe, base in ((18, 3.2), (50, 2.9)):
        folder = run.samples_folder / f"heun-{nfe // 2}-0123abcd"
        folder.mkdir(parents=True)
        images = random.integers(0, 256, (samples * classes // 10, size, size, 3), dtype=np.uint8)
        labels, evaluations = np.arange(len(images)) % classes, np.array([nfe, nfe])
        np.savez(folder / "samples.npz", arr_0=images, labels=labels, evaluations=evaluations)
        about = protocol(name, schedule, float(nfe))
        write_json(
            folder / "protocol.json",
            {"integrator": "heun", "steps": nfe // 2, "checkpoint_step": 700, "seed": 0},
        )
        value = base * FACTOR.get(name, 1.1) + 0.01 * random.random()
        figures.append(Figure("fid", value, about))
        figures.append(Figure("kid", value / 800, replace(about, metric="100 subsets of 40, seed 0"), 0.0004))
    save_figures(run.figures_file, figures)


@pytest.fixture
def config() -> Config:
    return preset("digits")


@pytest.fixture
def make_run(tmp_path, config):
    """make_run(*settings, filled=True) -> Run with its baselines in a fresh directory."""

    def make(*settings: str, filled: bool = True, folder: str = "run", **shape) -> Run:
        run = Run(Path(tmp_path) / folder, apply_settings(config, settings)).create()
        if filled:
            for seed, each in enumerate((run, *run.baselines())):
                fill(each, seed, **shape)
            run.prepared.mkdir()
            parts = {
                "encoder.safetensors": {
                    "sha256": "0" * 64,
                    "seed": 0,
                    "train accuracy": 0.9987,
                    "test accuracy": 0.9731,
                },
                "representation-semantic.safetensors": {
                    "sha256": "0" * 64,
                    "mse": 0.1234,
                    "cosine": 0.0567,
                    "kl": 12.5,
                },
            }
            identity = {"dataset": "digits", "classes": 10, "image shape": [1, 8, 8], "seed": 0}
            write_json(run.prepared / "prepared.json", {"parts": parts, "identity": identity})
        return run

    return make


@pytest.fixture
def full_run(make_run):
    return make_run()
