"""The study of schedules: ``python -m bench.science.study --preset cifar10 --questions 1,2 --seeds 3 --out DIR``.

Runs one job after another in the order of the questions, writes a row for each, and can be stopped at any moment:
the same command goes on.  ``--dry-run`` prints what is left and how long it takes; ``--seconds`` does what fits.
The same command started several times (on one GPU or, with CUDA_VISIBLE_DEVICES, on several) shares the work.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.science import probe_size, room, rules, transfer, variants
from bench.science.plan import (
    DONE,
    FAILED,
    METRICS,
    SECONDS,
    Job,
    Ledger,
    Question,
    RankJob,
    Rates,
    TrainJob,
    measured_rates,
    merge,
    seconds,
)
from bench.science.runner import Trained, Workshop, read_json
from bench.science.specs import SCAN_SEED, STUDIES, Study
from bench.science.table import Row, locked, markdown, write_csv
from fastasync.config import Config, flatten
from fastasync.errors import UserError, unknown_name
from fastasync.files import atomic_path, write_json
from fastasync.report.style import png
from fastasync.training import Interrupted, TrainingError

QUESTIONS: dict[int, Question] = {
    question.number: question
    for question in (
        rules.QUESTION,
        probe_size.QUESTION,
        transfer.LARGER,
        transfer.EFFICIENCY,
        variants.STEP_COUNTS,
        variants.OBJECTIVE,
        variants.THIRD,
        variants.INTEGRATORS,
        room.QUESTION,
    )
}
WAIT = 2.0  # seconds between two looks at what other processes have finished
PLACES = ("data.root=", "evaluate.weights=", "train.device=")  # settings that change no figure
FAILURES = 3  # in a row stop the study: then it is the machine, not the run
Say = Callable[[str], None]


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    top = argparse.ArgumentParser(prog="python -m bench.science.study", description=__doc__.splitlines()[0])
    top.add_argument("--preset", default="cifar10", help=", ".join(STUDIES))
    top.add_argument("--questions", default="1,2,3,4,5,6,7,8,9", help="numbers, in the order they are worked on")
    top.add_argument("--seeds", default="3", help="headline seeds: how many, or the first and the last (3-5)")
    top.add_argument("--scan-seeds", type=int, help="seeds that find the best fixed schedule (default: the protocol's)")
    top.add_argument("--longer", type=int, help="the longest runs, in budgets: 1, 2, 4, ... (default: the protocol's)")
    top.add_argument("--schedules", help="only runs along these, such as synchronous,power:2")
    top.add_argument("--out", type=Path, help="rows, tables, pictures (default bench/science/results/PRESET)")
    top.add_argument("--work", type=Path, help="encoders, probes, checkpoints (default runs/science-PRESET)")
    top.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="for every run")
    top.add_argument("--seconds", type=float, help="start nothing that would end later than this")
    top.add_argument("--dry-run", action="store_true", help="print the plan with its seconds, and stop")
    top.add_argument("--report", action="store_true", help="only write tables and pictures from the rows")
    top.add_argument("--keep", action="store_true", help="keep the checkpoints of scored runs")
    top.add_argument("--step-ms", type=float, default=10.0, help="assumed: a training step of the base network")
    top.add_argument("--forward-us", type=float, help="assumed: a forward pass of one image; default from the step")
    top.add_argument("--score-s", type=float, default=30.0, help="assumed: scoring one set of samples")
    return top


def plan(ledger: Ledger, workshop: Workshop, numbers: Sequence[int]) -> dict[int, list[Job]]:
    """What is left, by question; a job that several questions need stands at the first."""
    seen: set[Any] = set()
    wanted = {number: merge(QUESTIONS[number].jobs(ledger, workshop)) for number in numbers}
    whole = {_key(job): job for job in merge(job for jobs in wanted.values() for job in jobs)}
    left: dict[int, list[Job]] = {}
    for number, jobs in wanted.items():
        left[number] = []
        for job in jobs:
            # all its points at once, whichever question asks for them: it is trained once
            rest = ledger.missing(whole[_key(job)])
            if rest is not None and ledger.asked(rest) and _key(job) not in seen:
                left[number].append(rest)
            seen.add(_key(job))
    return left


def _key(job: Job) -> Any:
    return job.spec if isinstance(job, TrainJob) else job


def show_plan(ledger: Ledger, workshop: Workshop, numbers: Sequence[int], rates: Rates, say: Say) -> float:
    """Print what is left and its seconds; returns the sum."""
    source = "measured in finished runs" if rates.measured else "assumed"
    say(
        f"{ledger.study.preset}: {1e3 * rates.step:.3g} ms a step, {1e6 * rates.forward:.3g} us a forward pass of an "
        f"image, {rates.score:.3g} s a score ({source}); {workshop.hardware}"
    )
    total = 0.0
    for number, jobs in plan(ledger, workshop, numbers).items():
        times = [seconds(job, ledger, workshop, rates) for job in jobs]
        total += sum(times)
        say(f"question {number}: {QUESTIONS[number].title}: {len(jobs)} jobs left, {sum(times):,.0f} s")
        for job, took in zip(jobs, times):
            waits = "" if job.runnable else " (known after the scan)"
            say(f"  {took:8,.0f} s  {job}{waits}")
    say(f"all: {total:,.0f} s = {total / 3600:.1f} h")
    return total


def commit() -> str:
    """$FASTASYNC_COMMIT (for a copy without its git), or the commit that is checked out, with + for local changes."""
    if os.environ.get("FASTASYNC_COMMIT"):
        return os.environ["FASTASYNC_COMMIT"]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        name = git("rev-parse", "--short", "HEAD")
        return name + ("+" if git("status", "--porcelain", "--", "fastasync", "kernels", "bench/science/*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Worker:
    """Runs jobs and writes their rows."""

    def __init__(self, ledger: Ledger, workshop: Workshop, command: str, keep: bool, say: Say):
        self.ledger, self.workshop, self.keep, self.say = ledger, workshop, keep, say
        self.command, self.commit = command, commit()
        self.failures = 0  # in a row
        self.stopped: dict[Any, UserError] = {}  # jobs that cannot be done until something is mended

    def about(self, row: Row | None = None) -> dict[str, str]:
        """Where a row comes from; ``row``: whose figures stay, made by another commit or on other hardware perhaps."""
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        found = {"hardware": self.workshop.hardware, "commit": self.commit}
        if row and row["status"] == DONE:
            found = {name: _joined(row[name], value) for name, value in found.items()}
        return {**found, "command": self.command, "date": today}

    def run(self, job: Job) -> None:
        """One job; what goes wrong in it becomes its row.  Where something is damaged or missing no run failed of it:
        that is said, and kept in ``stopped``."""
        try:
            if isinstance(job, RankJob):
                self._rank(job)
            else:
                self._train(job)
            self.failures = 0
        except Exception as error:
            self.failures += 1
            if isinstance(error, UserError) and not _of_the_run(error):
                self.stopped[_key(job)] = error
                self.say(f"STOPPED {job}: {error}")
                return
            text = f"{type(error).__name__}: {error}"[:300]
            self.say(f"FAILED {job}: {text}")
            self._failed(job, text)

    def _failed(self, job: Job, text: str) -> None:
        what = {"status": FAILED, "error": text, **self.about()}
        if isinstance(job, RankJob):
            self.ledger.ranks.put({"variant": job.variant, "seed": job.seed, "schedule": "C", **what})
            return
        left = self.ledger.missing(job)  # points that were finished before it failed stay so
        for step, _ in left.points if isinstance(left, TrainJob) else ():
            self.ledger.runs.put({**asdict(job.spec), "step": step, **what})

    def _rank(self, job: RankJob) -> None:
        start = time.perf_counter()
        result, rows = self.workshop.rank(job.variant, job.seed, self.ledger.study.fixed)
        spent = sum(result.budget["seconds"].values())
        share = result.budget["spent_flops"] / result.budget["limit_flops"]
        facts = {
            "status": DONE,
            "error": "",
            "chosen": result.diagnostics["label"],
            "probe_steps": result.diagnostics["steps"],
            "budget": share * self.ledger.study.probe_config("C", job.variant, job.seed).probe.budget,
            "flops": float(result.budget["spent_flops"]),
            "probe_seconds": round(spent, 2),
            "rank_seconds": round(time.perf_counter() - start, 2),
            **self.about(),
        }
        for row in rows:
            self.ledger.ranks.put({"variant": job.variant, "seed": job.seed, **row._asdict(), **facts})

    def _train(self, job: TrainJob) -> None:
        if self._known(job):
            return
        steps = [step for step, _ in job.points]
        trained = self.workshop.train(job.spec, steps)
        for step, names in job.points:
            row = self.ledger.row(job.spec, step) or {}
            before = {name: float(row.get(name) or 0) for name in ("sample_seconds", "score_seconds")}
            for name in names:  # a row after each: what is interrupted goes on from there
                score = self.workshop.score(job.spec, trained, step, name)
                found = {f"{metric}_{name}": value for metric, value in score.figures.items()}
                if name == "dopri5":
                    found["nfe_dopri5"] = score.evaluations
                before["sample_seconds"] += score.sample_seconds
                before["score_seconds"] += score.score_seconds
                self.ledger.runs.put(
                    {
                        **asdict(job.spec),
                        "step": step,
                        "status": DONE,
                        "error": "",
                        "same_as": "",
                        **found,
                        "fingerprint": trained.schedule.fingerprint,
                        "lead": trained.schedule.lead(),
                        **_train_seconds(trained, step / max(steps)),
                        **{part: round(value, 2) for part, value in before.items()},
                        **self.about(row),
                    }
                )
        if not self.keep:
            self.workshop.discard(job.spec)

    def _known(self, job: TrainJob) -> bool:
        """Where a rule chose a schedule that was trained under another name: the same run, whose figures are taken."""
        own = [self.ledger.row(job.spec, step) for step, _ in job.points]
        if job.spec.start != "scratch" or any(row and not row["same_as"] for row in own):
            return False
        schedule = self.workshop.schedule(job.spec)  # may take a probe's minutes
        self.ledger.refresh()
        same = {"fingerprint": schedule.fingerprint, "hardware": self.workshop.hardware, "commit": self.commit}
        twins = [self.ledger.twin(job.spec, step, names, same) for step, names in job.points]
        if not all(twins):
            return False
        for (step, names), twin in zip(job.points, twins):
            assert twin is not None
            columns = [f"{metric}_{name}" for name in names for metric in METRICS] + ["fingerprint", "lead"]
            columns += ["nfe_dopri5"] if "nfe_dopri5" in twin else []
            taken = {name: twin[name] for name in columns} | dict.fromkeys(SECONDS, 0.0)
            about = self.about(self.ledger.row(job.spec, step))
            what = {"step": step, "status": DONE, "error": "", "same_as": twin["schedule"], **taken, **about}
            self.ledger.runs.put({**asdict(job.spec), **what})
            self.say(f"{job}: the schedule of {twin['schedule']}, which was trained on this seed")
        return True


def work(
    worker: Worker, numbers: Sequence[int], assumed: Rates, limit: float | None = None, say: Say = print
) -> list[Job]:
    """Do what is left, planning again after every job; returns what is left when it stops."""
    ledger, workshop = worker.ledger, worker.workshop
    start = time.perf_counter()
    while True:
        ledger.refresh()
        left = [job for jobs in plan(ledger, workshop, numbers).values() for job in jobs]
        ready = [job for job in left if job.runnable and _key(job) not in worker.stopped]
        rates = measured_rates(ledger, workshop.hardware, assumed)
        room = math.inf if limit is None else limit - (time.perf_counter() - start)
        if limit is not None:
            ready = [job for job in ready if seconds(job, ledger, workshop, rates) <= room]
        if worker.failures >= FAILURES:
            return left
        done_meanwhile = False
        for job in ready:
            with locked(workshop.claim(_key(job)), wait=False) as ours:
                if not ours:
                    continue
                if not _still_missing(ledger, job):
                    done_meanwhile = True
                    continue
                expected, began = seconds(job, ledger, workshop, rates), time.perf_counter()
                worker.run(job)
            say(f"{job}: {time.perf_counter() - began:.0f} s (expected {expected:.0f}); {len(left) - 1} jobs left")
            break
        else:
            if done_meanwhile and room > 0:
                continue  # which may have made other jobs ready
            if room <= 0 or not any(_in_other_hands(workshop, job) for job in left):
                return left
            time.sleep(WAIT)  # what another process finishes may make more jobs ready


def _train_seconds(trained: Trained, share: float) -> dict[str, float]:
    """Nothing where they are not known: what a row says already stays."""
    return {} if trained.seconds is None else {"train_seconds": round(trained.seconds * share, 2)}


def _of_the_run(error: UserError) -> bool:
    """Whether a run cannot be done as it is (it diverged, or its settings do not go together): no file is to blame."""
    fields = flatten(Config()).keys() - {place.removesuffix("=") for place in PLACES}
    return isinstance(error, TrainingError) or error.field in fields


def _joined(before: str, now: str) -> str:
    return " and ".join(dict.fromkeys([*filter(None, before.split(" and ")), now]))


def _still_missing(ledger: Ledger, job: Job) -> bool:
    """Whether no other process has finished it since it was planned."""
    ledger.refresh()
    return ledger.missing(job) == job


def _in_other_hands(workshop: Workshop, job: Job) -> bool:
    with locked(workshop.claim(_key(job)), wait=False) as ours:
        return not ours


def write_reports(ledger: Ledger, numbers: Sequence[int], command: str) -> Path:
    """Every question's tables (CSV), picture (PNG) and RESULTS.md with all of them."""
    folder, study = ledger.out, ledger.study
    hardware = sorted({row["hardware"] for row in ledger.runs.rows.values() if row["hardware"]})
    failed = [" ".join(key) for key, row in ledger.runs.rows.items() if row["status"] == FAILED]
    failed += [f"probe {key[0]}, seed {key[1]}" for key, row in ledger.ranks.rows.items() if row["status"] == FAILED]
    common = study.common()
    text = [
        f"# Results of the study on {study.preset}",
        f"Made by `{command}`; protocol: [PROTOCOL.md](../../PROTOCOL.md). Rows: runs.csv, probes.csv. "
        f"Hardware: {'; '.join(hardware) or 'none yet'}. {study.steps} training steps, {common.sample.count} samples, "
        f"{len(ledger.seeds)} headline seeds, {study.scan_seeds} scan seeds, features {common.evaluate.features}.",
        f"Failed runs: {'; '.join(failed) or 'none'}.",
    ]
    for number in numbers:
        report = QUESTIONS[number].report(ledger)
        text.append(f"## {number}. {QUESTIONS[number].title}")
        if not any(section.rows for section in report.sections):
            text.append("Nothing measured yet.")
            continue
        for section in report.sections:
            if section.rows:
                write_csv(folder / f"q{number}-{section.name}.csv", section.columns, section.rows)
                text += [section.caption, markdown(section.columns, section.rows)]
        if report.picture is not None:
            with atomic_path(folder / f"q{number}.png") as partial:
                partial.write_bytes(png(report.picture))
            text.append(f"![question {number}](q{number}.png)")
        if report.sentences:
            text.append("\n".join(f"- {sentence}" for sentence in report.sentences))
    path = folder / "RESULTS.md"
    with atomic_path(path) as partial:
        partial.write_text("\n\n".join(text) + "\n")
    return path


def check_settings(ledger: Ledger, settings: Sequence[str], write: bool) -> None:
    """Rows are known by schedule, seed and step: UserError where they were made with other ``--set`` than now.

    What was set is kept beside the rows, without what only says where things are.
    """
    path = ledger.out / "settings.json"
    asked = sorted(setting for setting in settings if not setting.startswith(PLACES))
    with locked(path.with_name(".settings.lock")) if write else nullcontext():
        rows = bool(ledger.runs.rows or ledger.ranks.rows)
        known: list[str] = []
        if path.exists():
            how = "it holds the --set of the rows beside it as a list of texts: bring it back"
            known = read_json(path, how)
            if not isinstance(known, list) or not all(isinstance(each, str) for each in known):
                raise UserError(str(path), "holds no list of texts", how)
        if asked != known and (rows or path.exists()):
            made = f"the rows in {ledger.out} were made" if rows else f"{ledger.out} was begun"
            remedy = f"{made} with {' '.join(known) or 'none'}: give another --out and --work"
            raise UserError("--set", " ".join(asked) or "(none)", remedy + ("" if rows else f", or remove {path}"))
        if write and not path.exists():
            write_json(path, asked)


def run(arguments: argparse.Namespace, study: Study | None = None, say: Say = print) -> int:
    """The whole study with parsed arguments; ``study`` in the place of the preset's."""
    if study is None and arguments.preset not in STUDIES:
        raise unknown_name("--preset", arguments.preset, STUDIES)
    study = (study or STUDIES[arguments.preset]).with_settings(tuple(arguments.set))
    numbers = _numbers(arguments.questions)
    scan = study.scan_seeds if arguments.scan_seeds is None else arguments.scan_seeds
    longer = study.longer if arguments.longer is None else arguments.longer
    seeds = _seeds(arguments.seeds)
    for name, count in (("--scan-seeds", scan), ("--longer", longer)):
        if count < 1:
            raise UserError(name, count, "give at least 1")
    study = replace(study, scan_seeds=scan, longer=longer)
    out = arguments.out or Path("bench/science/results") / study.preset
    only = arguments.schedules.split(",") if arguments.schedules else None
    known = (*study.fixed, *study.rules)
    for name in only or ():
        if name not in known:
            raise unknown_name("--schedules", name, known)
    study.common()  # what is wrong with --set is said before anything is written
    ledger = Ledger(study, seeds, out, only)
    check_settings(ledger, arguments.set, write=not (arguments.dry_run or arguments.report))
    workshop = Workshop(study, out, arguments.work or Path("runs") / f"science-{study.preset}", say)
    step = arguments.step_ms / 1e3
    # a training step costs three forward passes of the batch
    forward = arguments.forward_us / 1e6 if arguments.forward_us else step / (3 * study.common().train.batch)
    assumed = Rates(step, forward, arguments.score_s)
    command = shlex.join(["python", "-m", "bench.science.study", *arguments.words])
    if arguments.dry_run:
        show_plan(ledger, workshop, numbers, measured_rates(ledger, workshop.hardware, assumed), say)
        return 0
    if not arguments.report:
        workshop.scoring("pair")  # data and weights that are missing must not become failed runs
        worker = Worker(ledger, workshop, command, arguments.keep, say)
        left = work(worker, numbers, assumed, arguments.seconds, say)
        if left:
            say(f"{len(left)} jobs left; the same command goes on")
    say(f"wrote {write_reports(ledger, numbers, command)}")
    if not arguments.report and worker.stopped:
        raise next(iter(worker.stopped.values()))
    return 0


def _seeds(text: str) -> range:
    """``3`` -> 0, 1, 2; ``3-5`` -> 3, 4, 5."""
    found = re.fullmatch(r"(?:(\d{1,4})-)?(\d{1,4})", text.strip())
    first, last = (int(found[1] or 0), int(found[2])) if found else (0, -1)
    seeds = range(first, last + 1) if found and found[1] else range(last)
    if not seeds or seeds[-1] >= SCAN_SEED:
        raise UserError("--seeds", text, f"give how many, or the first and the last, such as 3-5, below {SCAN_SEED}")
    return seeds


def _numbers(text: str) -> list[int]:
    numbers = []
    for part in text.split(","):
        if part.strip() not in map(str, QUESTIONS):
            raise unknown_name("--questions", part, map(str, QUESTIONS))
        numbers.append(int(part))
    return list(dict.fromkeys(numbers))


def main(words: Sequence[str] | None = None) -> int:
    """The command line; 0 done, 2 bad input, 75 stopped by a signal."""
    words = list(sys.argv[1:] if words is None else words)
    arguments = parser().parse_args(words)
    arguments.words = words
    try:
        return run(arguments)
    except UserError as error:
        print(f"science: error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except (Interrupted, KeyboardInterrupt):
        print("science: interrupted; the same command goes on", file=sys.stderr)
        return 75


if __name__ == "__main__":
    sys.exit(main())
