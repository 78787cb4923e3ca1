"""Schedules: ends, monotonicity, convexity, derivatives, inversion, kinetic energy, files."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastasync.errors import UserError
from fastasync.schedule import (
    ConvexSchedule,
    OffsetSchedule,
    PowerSchedule,
    TableSchedule,
    cascade,
    check_monotone,
    kinetic_energy,
    load_schedule,
    named_schedule,
    offset,
    power,
    save_schedule,
    schedule_from_json,
    synchronous,
)

NAMES, ROLES = ("texture", "semantic"), ("lags", "leads")
NAMES3, ROLES3 = ("texture", "lowfreq", "semantic"), ("lags", "free", "leads")
S = torch.linspace(0, 1, 401, dtype=torch.float64)

logit = st.floats(-8, 8, allow_nan=False)


def convex_of(rows):
    roles = ROLES if len(rows) == 2 else ROLES3
    return ConvexSchedule(NAMES if len(rows) == 2 else NAMES3, roles, rows)


def all_schedules():
    generator = torch.Generator().manual_seed(0)
    yield synchronous(NAMES)
    yield offset(NAMES, 0.3, ROLES)
    yield cascade(NAMES3, ROLES3)
    yield power(NAMES, 3.0, ROLES)
    yield PowerSchedule(NAMES3, [2.5, 1.0, -2.0], floor=0.05)
    yield TableSchedule(NAMES, [0, 0.25, 1], [[0, 0], [0.1, 0.6], [1, 1]])
    for k in (2, 3):
        yield convex_of((3 * torch.randn(k, 8, generator=generator, dtype=torch.float64)).tolist())


@given(st.lists(st.lists(logit, min_size=8, max_size=8), min_size=2, max_size=3))
@settings(max_examples=60, deadline=None)
def test_convex_class_is_convex_monotone_and_ends_at_0_and_1(rows):
    schedule = convex_of(rows)
    with torch.no_grad():
        tau, dtau = schedule(S)
    assert check_monotone(schedule) is None
    assert float(dtau.min()) >= schedule.floor * 0.999
    bend = tau.diff(dim=0).diff(dim=0)
    assert float(bend[:, 0].min()) > -1e-12, "what lags is convex"
    assert float(bend[:, -1].max()) < 1e-12, "what leads is concave"
    if len(rows) == 2:  # texture time as a function of semantic time is convex: its slope never decreases
        ratio = dtau[:, 0] / dtau[:, 1]
        assert float((ratio.diff() / ratio[:-1]).min()) > -1e-9
        assert schedule.lead() >= 0


def test_local_times_of_the_convex_class_stay_inside_0_and_1():
    """To the last bit: guidance in [0, 1] would leave out a representation whose time starts at -2e-16."""
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        schedule = convex_of((2 * torch.randn(3, 8, generator=generator, dtype=torch.float64)).tolist())
        with torch.no_grad():
            for s in (S, S.float()):
                tau = schedule(s).tau
                assert float(tau.min()) == 0.0
                assert float(tau.max()) <= 1.0


@pytest.mark.parametrize("schedule", all_schedules(), ids=lambda s: f"{s.kind}-{s.count}")
def test_derivative_is_the_slope(schedule):
    s = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.98 + 0.01
    h = 1e-6
    with torch.no_grad():
        slope = (schedule(s + h).tau - schedule(s - h).tau) / (2 * h)
        dtau = schedule(s).dtau
    wrong = ((slope - dtau).abs() > 1e-5).double().mean()  # only points within h of a kink may differ
    assert float(wrong) < 0.01


@pytest.mark.parametrize("schedule", all_schedules(), ids=lambda s: f"{s.kind}-{s.count}")
def test_inversion_round_trips(schedule):
    tau = torch.cat([torch.tensor([1e-6, 0.5, 1 - 1e-6]), torch.rand(300, generator=torch.Generator().manual_seed(2))])
    tau = tau.to(torch.float64)
    for k in range(schedule.count):
        s = schedule.invert(k, tau)
        assert float(s.min()) >= 0
        assert float(s.max()) <= 1
        with torch.no_grad():
            assert torch.allclose(schedule(s).tau[:, k], tau, atol=1e-10, rtol=0)
        if not isinstance(schedule, (OffsetSchedule, TableSchedule)):
            inner = S[1:-1]
            with torch.no_grad():
                back = schedule.invert(k, schedule(inner).tau[:, k])
            assert torch.allclose(back, inner, atol=1e-8, rtol=0)


def test_parameter_gradients_against_finite_differences():
    for roles in (ROLES, ("free", "free")):
        logits = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        schedule = ConvexSchedule(NAMES, roles, logits)
        s = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

        def outputs(values, schedule=schedule, s=s):
            return torch.func.functional_call(schedule, {"logits": values}, (s,))

        assert torch.autograd.gradcheck(outputs, (logits.requires_grad_(),))


def test_kinetic_energy_reference_values():
    # tau = (1 - (1 - r)^2, r^2) with r = s: each representation has 4/3, and c = (1/2, 1/2)
    schedule = PowerSchedule(NAMES, [-2.0, 2.0], floor=0.0)
    assert math.isclose(float(kinetic_energy(schedule, (0.5, 0.5))), 4 / 3, rel_tol=1e-6)
    assert math.isclose(float(kinetic_energy(synchronous(NAMES), (0.5, 0.5))), 1.0, rel_tol=1e-12)
    # the offset clock runs 1 + D times as fast over 1 / (1 + D) of the time
    assert math.isclose(float(kinetic_energy(offset(NAMES, 0.3, ROLES), (0.5, 0.5))), 1.3, rel_tol=1e-3)


def test_offset_is_sfds_clock():
    tau = offset(NAMES, 0.3, ROLES)(S).tau
    assert torch.allclose(tau[:, 1], (S * 1.3).clamp(max=1))
    assert torch.allclose(tau[:, 0], (S * 1.3 - 0.3).clamp(min=0))
    assert math.isclose(offset(NAMES, 0.3, ROLES).lead(), 0.3, abs_tol=1e-9)
    ends = offset(NAMES, 0.3, ROLES)(torch.tensor([0.0, 1.0], dtype=torch.float64)).dtau
    assert torch.equal(ends, torch.tensor([[0.0, 1.3], [1.3, 0.0]], dtype=torch.float64))
    assert torch.equal(cascade(NAMES, ROLES)(S).tau, offset(NAMES, 1.0, ROLES)(S).tau)
    assert cascade(NAMES3, ROLES3).offsets == (2, 1, 0)
    assert cascade(NAMES3, ("leads", "lags", "free")).offsets == (0, 2, 1)


@pytest.mark.parametrize("schedule", all_schedules(), ids=lambda s: f"{s.kind}-{s.count}")
def test_json_round_trip(schedule, tmp_path):
    path = tmp_path / "schedule.json"
    save_schedule(schedule, path)
    again = load_schedule(path, schedule.names)
    assert again.fingerprint == schedule.fingerprint
    with torch.no_grad():
        assert torch.equal(again(S).tau, schedule(S).tau)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("not json", "not JSON"),
        ('{"kind": "offset", "na', "bring it back (a run's checkpoints hold theirs in state.json)"),
        ('{"kind": "spiral"}', "spiral"),
        ('{"kind": "offset", "names": ["texture"], "offsets": [0]}', "K = 1"),
        ('{"kind": "offset", "names": ["texture", "semantic"], "offsets": [NaN, 0]}', "NaN"),
        ('{"kind": "offset", "names": ["texture", "semantic"], "offsets": [0.1, 0.2]}', "smallest 0"),
        ('{"kind": "offset", "names": ["texture", "semantic"], "colour": 3}', "offset schedule"),
        (
            '{"kind": "table", "names": ["texture", "semantic"], "s": [0, 0.5, 1],'
            ' "tau": [[0, 0], [0.6, 0.5], [0.7, 1]]}',
            "0.7",
        ),
        (
            '{"kind": "table", "names": ["texture", "semantic"], "s": [0, 0.5001, 0.5002, 0.5003, 1],'
            ' "tau": [[0, 0], [0.5, 0.5], [0.2, 0.5], [0.5, 0.5], [1, 1]]}',
            "decreases after s = 0.5001",
        ),
        ('{"kind": ["offset"], "names": ["texture", "semantic"]}', "['offset']"),
        (
            '{"kind": "offset", "names": ["texture", "semantic"], "offsets": [1' + "0" * 400 + ", 0]}",
            "too large",
        ),
        (
            '{"kind": "table", "names": ["texture", "semantic"], "s": [0, 0.5, 1],'
            ' "tau": [[0, 0], [0.8, 1.2], [1, 1]]}',
            "decreases",
        ),
        ("[1, 2]", "list"),
    ],
)
def test_bad_schedule_files_are_refused(text, says, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bad\.json") as caught:
        load_schedule(path, NAMES)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_named_schedules(tmp_path):
    assert named_schedule("offset:0.3", NAMES, ROLES).fingerprint == offset(NAMES, 0.3, ROLES).fingerprint
    assert named_schedule("power:3", NAMES, ROLES).fingerprint == power(NAMES, 3, ROLES).fingerprint
    save_schedule(synchronous(NAMES), tmp_path / "a.json")
    assert named_schedule(str(tmp_path / "a.json"), NAMES, ROLES).kind == "offset"
    for bad in ("offset", "offset:x", "offset:-1", "power:0.5", "power:inf", "sync", str(tmp_path / "none.json")):
        with pytest.raises(UserError):
            named_schedule(bad, NAMES, ROLES)
    with pytest.raises(UserError, match="K = 2"):
        schedule_from_json(json.loads((tmp_path / "a.json").read_text()), NAMES3)
