"""Learning a schedule: joint training (A), loss surface (B), generation in the loop (C), budget, oracle."""

from fastasync.probe.budget import Budget, BudgetExceeded, plan_probe
from fastasync.probe.diagnostics import curl, curl_report, describe
from fastasync.probe.gaussian import GaussianCase
from fastasync.probe.generation import REFERENCE_SAMPLES, Scorer, Selection, candidate_family, search
from fastasync.probe.learn import ProbeResult, check_begun, learn_schedule, probe_plan
from fastasync.probe.oracle import OraclePath, best_path
from fastasync.probe.surface import LossSurface, line_loss, minimise, naive_loss, sweep

__all__ = [
    "REFERENCE_SAMPLES",
    "Budget",
    "BudgetExceeded",
    "GaussianCase",
    "LossSurface",
    "OraclePath",
    "ProbeResult",
    "Scorer",
    "Selection",
    "best_path",
    "candidate_family",
    "check_begun",
    "curl",
    "curl_report",
    "describe",
    "learn_schedule",
    "line_loss",
    "minimise",
    "naive_loss",
    "plan_probe",
    "probe_plan",
    "search",
    "sweep",
]
