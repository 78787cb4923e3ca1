"""The stages of the main job over a run directory.  Each is resumable: run again, it continues or says it is done.

prepare -> probe -> train -> sample -> evaluate -> report

Under a launcher every rank calls every stage.  Rank 0 prepares, probes and scores while the others wait, and alone
prints; all train and sample.  Which rank draws a random number matters nowhere: each is keyed by what it is for.
"""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastasync import sampling
from fastasync.compat import import_torch_fidelity
from fastasync.config import Config
from fastasync.data.shard_loader import ShardLatents, open_latents
from fastasync.data.verify import Verification
from fastasync.distributed import OtherRankFailed, quiet_elsewhere, session
from fastasync.errors import UserError
from fastasync.evaluation import Figure, InceptionFeatures, evaluate, figures_from, load_figures, save_figures
from fastasync.evaluation.protocol import hardware_name, metric_title
from fastasync.files import sha256_file, write_json
from fastasync.inputs import Inputs, Reference, check_decoder, check_inputs, check_outputs, open_inputs
from fastasync.model import (
    Zero,
    load_into,
    load_state,
    memory_estimate,
    memory_with_zero,
    parameter_count,
    train_flops,
)
from fastasync.model.importer import check_fits
from fastasync.probe import ProbeResult, Selection, check_begun, learn_schedule, probe_plan
from fastasync.run import Run
from fastasync.schedule import Schedule, load_schedule, named_schedule, save_schedule
from fastasync.throughput import expected_hours
from fastasync.training import build_model, checkpoint, load_model, train
from fastasync.training.build import (
    check_fp8,
    check_training,
    choose_autocast,
    choose_device,
    choose_ops,
    prepare_sampling,
)
from fastasync.training.deepspeed_json import reduction_fields
from fastasync.training.graph import GraphedForward, wants_forward_graph
from fastasync.training.interrupt import only_process
from fastasync.training.loop import check_data
from fastasync.training.out_of_memory import explained_batch, explained_sampling
from fastasync.training.repa import repa_costs, repa_features
from fastasync.training.sinks import wandb_package
from fastasync.training.start import START, load_start, only_started

Say = Callable[[str], None]
AT_ONCE = 2 * 2**30  # bytes of a rank's shards whose hashes are compared before their numbers are used: in seconds
_PLANNED_GPUS = 8  # for which --dry-run says what ZeRO needs, and how long training takes


def planned_flops(config: Config) -> int:
    """FLOPs of the run that the probe serves: train.steps steps of train.batch images."""
    with torch.device("meta"):
        model = build_model(config)
    return train_flops(model) * config.train.batch * config.train.steps


def check_schedules(run: Run) -> None:
    """Raises UserError unless the run's schedule and each baseline's is one, or a file that the run keeps
    (schedule.json); where the file is still there, it must not have changed.
    """
    reps = run.config.representations
    folders: dict[Path, str] = {}
    for each in (run, *(run.baseline(name) for name in run.config.schedule.others)):
        name = each.config.schedule.name
        if folders.setdefault(each.path, name) != name:
            raise UserError("schedule.baselines", name, f"would share {each.path} with {folders[each.path]}: rename it")
        kept = each.schedule_file.exists()
        if name == "learned" or (kept and name.endswith(".json") and not Path(name).exists()):
            continue
        named = named_schedule(name, reps.names, reps.roles)
        if kept and name.endswith(".json"):
            known = load_schedule(each.schedule_file, reps.names)
            if known.fingerprint != named.fingerprint:
                what = f"holds another schedule than {each.schedule_file}, which this run trains along"
                raise UserError("schedule.name", name, f"{what}: give a new --out, or bring the old file back")


def preflight(run: Run, stages: Sequence[str]) -> None:
    """Everything that can be checked before any work or any file: data, device, network, schedules, probe, weights.

    Raises UserError.  ``stages``: those about to run.
    """
    config = run.config
    choose_ops(config.model.kernels, choose_device(config.train.device))
    check_schedules(run)
    images, classes = config.data.dataset != "latents", config.model.classes
    selection = check_inputs(config) if images else Selection()
    if not images:
        check_outputs(config, stages)
        with open_latents(config.data.root, features=config.objective.cached_features, classes=classes) as latents:
            check_inputs(config, latents)  # opened once: on a slow disk that takes its time
            check_data(config, latents)
            if "sample" in stages:
                check_decoder(config, latents)
            if config.objective.repa_source == "cached" or "train" in stages:
                repa_features(config, latents)
    elif config.objective.repa_weight:
        raise UserError("objective.repa_weight", config.objective.repa_weight, "only a folder of latents has features")
    if "probe" in stages and to_be_learned(run):
        probe_plan(config, planned_flops(config), selection)
    if config.sampling_precision == "fp8" and "sample" in stages:
        check_fp8(choose_device(config.train.device), "sample.precision")
    if "sample" in stages:
        wants_forward_graph(config.sample.cuda_graph, choose_device(config.train.device))
    if config.sample.guidance == "autoguidance" and "sample" in stages:
        weak = Path(config.sample.weak_checkpoint)
        if not weak.exists():
            raise UserError("sample.weak_checkpoint", weak, "no such file or run directory")
        if weak.is_dir():
            checkpoint.find(weak)
        else:
            with torch.device("meta"):
                check_fits(build_model(config), load_state(weak), str(weak))
    if "train" in stages:
        check_training(config, choose_device(config.train.device))
        if config.train.wandb:
            wandb_package()
    if "evaluate" in stages:
        if config.sample.count < 2:
            raise UserError(
                "sample.count", config.sample.count, "evaluating needs at least 2 samples, and means little with few"
            )
        if set(config.evaluate.metrics) - {"fid"}:
            import_torch_fidelity()
        if config.evaluate.features == "inception":
            InceptionFeatures(config.evaluate.weights)


def check_same_latents(run: Run) -> None:
    """UserError where the run's newest checkpoint is of other latents than its data.root holds now."""
    config, known = run.config, checkpoint.whole(run.path / checkpoint.FOLDER)
    if config.data.dataset != "latents" or not known:
        return
    newest = known[-1][1]
    trained = checkpoint.read_state(newest).statistics
    with open_latents(config.data.root, classes=config.model.classes) as latents:
        found = latents.statistics_fingerprint
    if found != trained:
        what = f"has latents with statistics {found[:12]}, {newest.name} was trained on {trained[:12]}"
        raise UserError("data.root", config.data.root, f"{what}: give their folder, or another --out")


def to_be_learned(run: Run) -> list[Run]:
    """The run and its baselines whose schedules a probe has still to learn."""
    every = (run, *(run.baseline(name) for name in run.config.schedule.others))
    return [each for each in every if each.config.schedule.name == "learned" and not each.schedule_file.exists()]


def check_begun_probes(run: Run) -> None:
    """Raises UserError where an interrupted probe of the run or of a baseline was planned for other train.steps."""
    for each in to_be_learned(run):
        check_begun(each.probe_folder, each.config.train.steps)


def prepare_stage(run: Run, say: Say = print) -> Inputs:
    """The run's latents and what goes with them; images are encoded first (encoder, SemVAE and scorer are trained)."""
    device = choose_device(run.config.train.device)
    return session().main_first(lambda: open_inputs(run, device, quiet_elsewhere(say)))


def verify_latents(run: Run, inputs: Inputs) -> None:
    """Compare the shards' hashes, each rank a part: at once where it takes seconds, else in a thread from now on.

    Raises UserError for a damaged one; the probe and the training loop look at what the thread finds.
    """
    latents, here = inputs.latents, session()
    if not (run.config.data.verify and isinstance(latents, ShardLatents)):
        return
    say = quiet_elsewhere(lambda line: tqdm.write(line, file=sys.stderr))
    verification = latents.start_verifying(here.rank, here.world, AT_ONCE, say)
    if not verification.large:
        verification.wait()
    failed = here.gather(verification.error is not None)
    if verification.error is not None:
        raise verification.error
    if any(failed):
        raise OtherRankFailed(UserError.exit_code)


def probe_stage(run: Run, inputs: Inputs, *, oracle: bool = False, say: Say = print) -> Schedule:
    """The run's schedule: learned by the probe, or the fixed one that is named.  Writes schedule.json."""
    learns = run.config.schedule.name == "learned" and not session().from_main(run.schedule_file.exists)
    if learns:
        verify_latents(run, inputs)
    schedule = session().main_first(lambda: _probe(run, inputs, oracle, quiet_elsewhere(say)))
    if learns:  # what has been found meanwhile, on ranks that waited too
        verify_latents(run, inputs)
    return schedule


def _probe(run: Run, inputs: Inputs, oracle: bool, say: Say) -> Schedule:
    config, reps = run.config, run.config.representations
    if run.schedule_file.exists():
        schedule = load_schedule(run.schedule_file, reps.names)
        say(f"probe: done, {run.schedule_file} holds {schedule.kind} {schedule.fingerprint}")
        if oracle and config.schedule.name == "learned":
            known = ProbeResult.load(run.probe_folder)
            if known is None or "oracle" not in known.diagnostics:
                say("probe: it was learned without --oracle, which cannot be added: use another --out")
        return schedule
    if config.schedule.name != "learned":
        schedule = named_schedule(config.schedule.name, reps.names, reps.roles)
    else:
        device, batch = choose_device(config.train.device), config.probe.batch
        with explained_batch("probe.batch", batch, device, " (another probe: give a new --out)"):
            result = learn_schedule(
                config,
                inputs.latents,
                planned_flops=planned_flops(config),
                score=inputs.scorer() if config.probe.estimator == "C" else None,
                device=device,
                out_dir=run.probe_folder,
                oracle=oracle,
            )
        schedule = result.schedule
        for line in result.summary():
            say(f"probe: {line}")
    save_schedule(schedule, run.schedule_file)
    say(f"probe: {run.schedule_file} holds {schedule.kind} {schedule.fingerprint}")
    return schedule


def check_sampling(run: Run) -> None:
    """Raises UserError where there is nothing to sample from: no checkpoint, no imported weights with a schedule."""
    if checkpoint.steps(run.path / checkpoint.FOLDER):
        return
    if not only_started(run.path):
        raise UserError("checkpoint", f"none in {run.path}", "train first, or give another --out")
    if run.config.schedule.name == "learned" and not run.schedule_file.exists():
        remedy = (
            "is not known yet: `fastasync probe` learns it; or import into a new --out with --set schedule.name=..."
        )
        raise UserError("schedule.name", "learned", remedy)


def train_stage(run: Run, inputs: Inputs, schedule: Schedule, say: Say = print) -> None:
    """Train the network along the schedule, from the newest complete checkpoint if there is one."""
    verify_latents(run, inputs)
    begins = not checkpoint.steps(run.path / checkpoint.FOLDER) and not only_started(run.path)
    if begins and run.config.objective.cosine_weight and not run.config.train.clip:
        quiet_elsewhere(say)(
            "train: a new network's velocity is 0, where the cosine's gradient is of norm 1e8, which AdamW remembers: "
            "the output layer hardly moves for thousands of steps; train.clip=1 prevents it (SFD does not clip)"
        )
    result = train(run.config, inputs.latents, schedule, run.path, statistics_fingerprint=inputs.statistics_fingerprint)
    say = quiet_elsewhere(say)
    say(f"train: {result.step} steps done, checkpoint {result.checkpoint}")
    verification: Verification | None = getattr(inputs.latents, "verification", None)
    if verification is not None and not verification.done:
        compared = f"{verification.verified} of {verification.count}"
        say(f"train: only {compared} shards were compared with their hashes: `fastasync check-latents` reads all")


class _Guided(NamedTuple):
    velocity: sampling.integrators.VelocityFunction
    guidance: str  # kind, scales, interval and weak model in words: the protocol's


def _velocity(config: Config, model: Any, device: torch.device, statistics: str) -> _Guided:
    """The trained network as a velocity function, with the configured guidance and precision.

    ``statistics``: fingerprint of the latents' statistics, which a weak run must share.
    """
    sample = config.sample

    def autocast(network: Any) -> Any:
        dtype = prepare_sampling(network, sample.batch, config.sampling_precision, device, session().gather)

        def call(x: Tensor, tau: Tensor, y: Tensor) -> Tensor:
            with torch.autocast(device.type, dtype or torch.float32, enabled=dtype is not None):
                return network(x, tau, y)

        if not wants_forward_graph(sample.cuda_graph, device):
            return call
        return GraphedForward(call, device, watch=sample.cuda_graph == "auto")

    if sample.guidance == "none":
        return _Guided(autocast(model), "none")
    scales = sample.guidance_scale * (len(model.channels) if len(sample.guidance_scale) == 1 else 1)
    interval = (sample.guidance_interval[0], sample.guidance_interval[1])
    text = ",".join(f"{g:g}" for g in sample.guidance_scale)
    text = f"{sample.guidance} {text} in [{interval[0]:g}, {interval[1]:g}]"
    if sample.guidance == "cfg":
        null_class = config.model.classes
        return _Guided(sampling.guided(autocast(model), scale=scales, interval=interval, null_class=null_class), text)
    weak, name = _weak_model(config, device, statistics)
    velocity = sampling.guided(autocast(model), scale=scales, interval=interval, weak=autocast(weak))
    return _Guided(velocity, f"{text} by {name}")


def _weak_model(config: Config, device: torch.device, statistics: str) -> tuple[Any, str]:
    """AutoGuidance's weak network, and its name with a hash of its weights.

    One of our checkpoints or runs, or a published file of the configured size.
    """
    path = Path(config.sample.weak_checkpoint)
    if path.is_dir():
        found = checkpoint.find(path)
        # other weights under the same path are another weak model: the manifest holds their hashes
        name = f"{path.name} {found.name} {sha256_file(found / checkpoint.MANIFEST)[:8]}"
        weak = load_model(found, ema=True, device=device)
        if weak.info.statistics != statistics:
            raise UserError("sample.weak_checkpoint", path, "was trained on other latents than this run")
        return weak.model, name
    model = build_model(config)
    load_into(model, load_state(path), source=str(path))
    return model.to(device).eval(), f"{path.name} {sha256_file(path)[:8]}"


def sample_stage(run: Run, inputs: Inputs, say: Say = print) -> list[Path]:
    """Generate images for every step count: ``samples/NAME/{samples.npz,protocol.json}``.  Returns the folders."""
    config, sample, device = run.config, run.config.sample, choose_device(run.config.train.device)
    here, say = session(), quiet_elsewhere(say)
    if imported := only_started(run.path):
        say(f"sample: {run.path / START} was not trained here: that it belongs to these latents cannot be checked")
        along = probe_stage(run, inputs, say=say)  # the file, or a fixed one: see check_sampling
        loaded = load_start(run.path, config, along, inputs.statistics_fingerprint, device)
    else:
        loaded = load_model(run.path, ema=sample.ema, device=device, say=say)
    schedule, model = loaded.schedule, loaded.model
    if loaded.info.statistics != inputs.statistics_fingerprint:
        what = f"statistics {inputs.statistics_fingerprint[:12]}, the checkpoint has {loaded.info.statistics[:12]}"
        raise UserError(str(run.prepared), what, "bring back the latents that it was trained on, or use another --out")
    dtype = choose_autocast(config.sampling_precision, device)
    velocity, guidance = _velocity(config, model, device, inputs.statistics_fingerprint)
    ops = choose_ops(config.model.kernels, device)
    classes = sample.classes or tuple(range(config.model.classes))
    folders = []
    for steps in sample.steps if sample.integrator != "dopri5" else sample.steps[:1]:

        def make(indices: Tensor, steps: int = steps) -> tuple[Tensor, Tensor, int]:
            calls = 0

            def counted(x: Tensor, tau: Tensor, y: Tensor) -> Any:
                nonlocal calls
                calls += 1
                return velocity(x, tau, y)

            labels = sampling.sample_labels(indices, classes, sample.labels, sample.seed)
            z = sampling.generate_latents(
                counted,
                schedule,
                indices,
                labels,
                channels=model.channels,
                side=model.grid,
                grid=sampling.time_grid(schedule, steps, sample.grid_power, sample.last_step),
                method=sample.integrator,
                seed=sample.seed,
                device=device,
                ops=ops,
            )
            return inputs.decode(z), labels, calls

        protocol = {
            "schedule": run.config.schedule.name,
            "schedule_fingerprint": schedule.fingerprint,
            "integrator": sample.integrator
            + (f" grid power {sample.grid_power:g}" if sample.grid_power != 1 else "")
            + (f" last step {sample.last_step:g}" if sample.last_step else ""),
            "steps": steps,
            "guidance": guidance,
            "labels": sample.labels,
            "precision": ("fp8, " if config.sampling_precision == "fp8" else "")
            + ("fp32" if dtype is None else "bf16 autocast"),
            "seed": sample.seed,
            "checkpoint_step": loaded.info.step,
            "ema": config.train.ema if sample.ema else 0.0,
            "decode": f"{inputs.decoder} to uint8",
            "hardware": hardware_name(device),
        }
        identity = {**protocol, "count": sample.count, "classes": classes, "hardware": device.type}
        if imported:
            identity["weights"] = sha256_file(run.path / START)
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
        folder = run.samples_folder / f"{sample.integrator}-{steps}-{digest}"
        if here.from_main(lambda folder=folder: (folder / "samples.npz").exists()):  # type: ignore[misc]
            say(f"sample: done, {folder}")
        else:
            index_batches = list(sampling.batches(sample.count, sample.batch, sample.integrator))
            label = f"sample {run.config.schedule.name} {sample.integrator} {steps}"
            spread: dict[str, Any] = {"rank": here.rank, "world": here.world, "label": label, "progress": here.is_main}
            here.main_only(lambda folder=folder, protocol=protocol: write_json(folder / "protocol.json", protocol))  # type: ignore[misc]
            say(f"sample: {sample.count} images into {folder}")
            with ExitStack() as stack:  # two that join the same parts would take them from each other
                here.main_only(lambda folder=folder: stack.enter_context(only_process(folder, "sampling")))  # type: ignore[misc]
                with explained_sampling(sample, device):
                    sampling.generate_images(make, index_batches, sample.count, folder, join=here.world == 1, **spread)
                here.barrier()
                if here.world > 1 and here.is_main:
                    sampling.generate_images(make, index_batches, sample.count, folder)  # joins what all have made
        folders.append(folder)
    return folders


def evaluate_stage(run: Run, inputs: Inputs, folders: list[Path], say: Say = print) -> list[Figure]:
    """Score every folder of samples; ``figures.json`` holds each figure with its protocol.  Rank 0 returns them."""
    return session().main_only(lambda: _evaluate(run, inputs, folders, say)) or []


def _evaluate(run: Run, inputs: Inputs, folders: list[Path], say: Say) -> list[Figure]:
    config, extractor = run.config, inputs.extractor()
    reference: Reference | None = None
    figures: list[Figure] = []
    for folder in folders:
        stored = folder / f"figures-{extractor.name}-{extractor.fingerprint[:8]}-{_reference_name(config)}.json"
        known = load_figures(stored) if stored.exists() else []
        metrics = [name for name in config.evaluate.metrics if not _has(known, name)]
        if metrics:
            reference = reference or inputs.reference(extractor)
            try:
                with np.load(folder / "samples.npz") as arrays:
                    pixels = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2)
                    evaluations = float(arrays["evaluations"].mean())
                protocol = dict(json.loads((folder / "protocol.json").read_text()))
                del protocol["steps"]
            except (OSError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:
                what = f"samples.npz or protocol.json cannot be read ({error})"
                raise UserError(str(folder), what, "remove this folder and sample again") from None
            if inputs.grey:
                pixels = pixels[:, :1]
            result = evaluate(pixels.contiguous(), reference.features, extractor, metrics)
            for note in result["notes"]:
                say(f"evaluate: {note}")
            about = {
                **protocol,
                "function_evaluations": evaluations,
                "reference": reference.name,
                "reference_fingerprint": reference.fingerprint,
            }
            known = [*known, *figures_from(result, about)]
            save_figures(stored, known)
        figures += known
        for figure in known:
            title = metric_title(figure.name, extractor.name)
            say(f"evaluate: {config.schedule.name} {folder.name}: {title} {figure.value:.4g}")
    save_figures(run.figures_file, [*_others(run, figures), *figures])
    return figures


def _others(run: Run, figures: list[Figure]) -> list[Figure]:
    """The run's earlier figures of the same weights that other samplers or guidance gave: they stay in the report."""
    try:
        known = load_figures(run.figures_file) if run.figures_file.exists() else []
    except UserError:  # damaged, or of another version: it is made anew
        return []
    same = ["schedule_fingerprint", "checkpoint_step", "ema", "samples"]
    same += ["extractor_fingerprint", "reference_fingerprint"]
    way = ("integrator", "function_evaluations", "guidance", "precision")

    def of(figure: Figure, fields: Sequence[str]) -> tuple[Any, ...]:
        return tuple(getattr(figure.protocol, name) for name in fields)

    weights = {of(figure, same) for figure in figures}
    replaced = {(figure.name, *of(figure, way)) for figure in figures}
    return [each for each in known if of(each, same) in weights and (each.name, *of(each, way)) not in replaced]


def _reference_name(config: Config) -> str:
    """Names what is compared with; a file by its place, size and time too: another one may have the same name."""
    if not config.evaluate.reference:
        return config.evaluate.split
    path = Path(config.evaluate.reference).resolve()
    facts = [str(path), *((path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else ())]
    return f"{path.stem}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]}"


def _has(figures: list[Figure], metric: str) -> bool:
    wanted = {"precision_recall": "precision"}.get(metric, metric)
    return any(figure.name == wanted for figure in figures)


def report_stage(run: Run, say: Say = print) -> Path:
    """samples.png, schedule.png, curves.png and report.html of a run and its baselines."""
    from fastasync.report import comparison_table, write_report  # matplotlib takes a second to import

    def write() -> None:
        path = write_report(run)
        say(comparison_table(run))
        say(f"report: {path}")

    session().main_only(write)
    return run.path / "report.html"


def run_all(run: Run, *, oracle: bool = False, say: Say = print) -> Path:
    """All stages in order, then the baselines' train, sample and evaluate, then the report over all of them.

    A baseline whose schedule is the one that the probe chose is the same training: the report shows it once for both.
    """
    inputs = prepare_stage(run, say)
    first: dict[str, str] = {}
    for each in (run, *session().main_first(run.baselines)):
        schedule = probe_stage(each, inputs, oracle=oracle, say=say)
        name = each.config.schedule.name
        served = first.setdefault(schedule.fingerprint, name)
        folder = each.path / checkpoint.FOLDER
        begun = session().from_main(lambda folder=folder: checkpoint.steps(folder))  # type: ignore[misc]
        if served != name and not begun:
            quiet_elsewhere(say)(f"train: {name} is the schedule of {served}: its network serves both")
            continue
        train_stage(each, inputs, schedule, say)
        evaluate_stage(each, inputs, sample_stage(each, inputs, say), say)
    return report_stage(run, say)


def summary(config: Config) -> dict[str, Any]:
    """What ``--dry-run`` prints: parameters, FLOPs, the probe's share, hours, memory."""
    with torch.device("meta"):
        model = build_model(config)
    per_step = train_flops(model) * config.train.batch
    device = choose_device(config.train.device)
    precision = "bf16" if choose_autocast(config.train.precision, device) else "fp32"
    learns = config.schedule.name == "learned"
    total = per_step * config.train.steps
    facts = {
        "parameters": parameter_count(model),
        "FLOPs per step": per_step,
        "FLOPs of the run": total,
        "probe's share of them, at most": config.probe.budget if learns else 0.0,
        "device and precision here": f"{device}, {precision}",
    }
    facts |= expected_hours(config, train_flops(model), _PLANNED_GPUS)
    for kind in dict.fromkeys((precision, "bf16")):
        memory = memory_estimate(model, config.train.batch, kind)
        parts = {**memory._asdict(), "total": memory.total}
        facts[f"memory estimate on one device, {kind}, GiB"] = {name: part / 2**30 for name, part in parts.items()}
    if config.train.batch % _PLANNED_GPUS == 0:
        memory = memory_estimate(model, config.train.batch // _PLANNED_GPUS, "bf16")
        compiled = config.train.accumulate == 1 and config.train.optimizer in ("auto", "fused")
        working = compiled and not reduction_fields(config)  # bf16 weights are trained under ZeRO 1 and 2
        needs = {3: " (with train.compile=off)"} if config.train.compile != "off" else {}
        facts[f"memory estimate on each of {_PLANNED_GPUS} GPUs, bf16, GiB"] = {
            f"ZeRO {stage}{needs.get(stage, '')}": memory_with_zero(memory, Zero(stage, _PLANNED_GPUS, working)) / 2**30
            for stage in range(4)
        }
    if config.data.dataset == "latents" and config.model.repa_width:
        facts |= repa_costs(config, per_step)
    if learns:
        try:
            selection = check_inputs(config)
        except UserError as error:  # the data need not be here yet
            facts["data"], selection = str(error), Selection()
        facts["probe's training steps"] = probe_plan(config, total, selection).steps
        facts["probe on several GPUs"] = "runs on one, the others wait: its seconds are those of one GPU"
    return facts


__all__ = [
    "check_begun_probes",
    "check_sampling",
    "check_schedules",
    "evaluate_stage",
    "planned_flops",
    "prepare_stage",
    "probe_stage",
    "report_stage",
    "run_all",
    "sample_stage",
    "summary",
    "train_stage",
]
