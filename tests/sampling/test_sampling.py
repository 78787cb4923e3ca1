"""Sampling: exact on Gaussians, order of convergence, guidance identities, independence of the batch."""

import math

import numpy as np
import pytest
import torch

from fastasync.sampling import (
    Velocity,
    batches,
    evaluations,
    generate_images,
    generate_latents,
    guided,
    integrate,
    sample_labels,
    time_grid,
    uniform_grid,
)
from fastasync.schedule import ConvexSchedule, offset, power, synchronous

NAMES, ROLES = ("texture", "semantic"), ("lags", "leads")
COV = torch.tensor([[1.5, 0.8], [0.8, 0.7]], dtype=torch.float64)
MEAN = torch.tensor([0.3, -0.5], dtype=torch.float64)


def gaussian_velocity(x, tau, y):
    """Exact v = E[z - eps | x] for z ~ N(MEAN, COV), two channels, one for each representation; x [B, 2, 1, 1]."""
    flat = x[:, :, 0, 0]
    out = []
    for row, times in zip(flat, tau):
        t = torch.diag(times.to(torch.float64))
        noise = torch.eye(2, dtype=torch.float64) - t
        gain = (COV @ t - noise) @ torch.linalg.inv(t @ COV @ t + noise @ noise)
        out.append(MEAN + gain @ (row.to(torch.float64) - t @ MEAN))
    return torch.stack(out)[:, :, None, None].to(x.dtype)


def affine_map(schedule, grid, method, **tolerance):
    """The sampler is affine in the noise here: its offset and matrix, from three starting points."""
    starts = torch.zeros(3, 2, 1, 1, dtype=torch.float64)
    starts[1, 0], starts[2, 1] = 1, 1
    ends = integrate(
        gaussian_velocity,
        schedule,
        starts,
        torch.zeros(3, dtype=torch.long),
        grid,
        method,
        channels=(1, 1),
        **tolerance,
    )[:, :, 0, 0]
    return ends[0], torch.stack([ends[1] - ends[0], ends[2] - ends[0]], dim=1)


def covariance_error(schedule, steps, method, **tolerance):
    mean, matrix = affine_map(schedule, uniform_grid(steps), method, **tolerance)
    return float((matrix @ matrix.T - COV).norm() + (mean - MEAN).norm())


SMOOTH = ConvexSchedule(NAMES, ROLES, torch.zeros(2, 8).tolist())


@pytest.mark.parametrize("schedule", [synchronous(NAMES), offset(NAMES, 0.3, ROLES), power(NAMES, 3, ROLES), SMOOTH])
def test_exact_on_a_gaussian(schedule):
    assert covariance_error(schedule, 200, "heun") < 1e-3
    # dopri5's error follows its tolerance, through kinks too (at the peers' rtol = 1e-3 it is 0.002 to 0.03 here)
    assert covariance_error(schedule, 1, "dopri5", rtol=1e-7, atol=1e-9) < 1e-4


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("heun_euler", 2)])
@pytest.mark.parametrize("schedule", [synchronous(NAMES), power(NAMES, 2, ROLES)])
def test_order_of_convergence(schedule, method, order):
    coarse, fine = covariance_error(schedule, 64, method), covariance_error(schedule, 128, method)
    assert abs(math.log2(coarse / fine) - order) < 0.15


def test_increments_are_exact_through_kinks():
    """A constant velocity is carried exactly from noise to data by any grid, even where tau' jumps inside a step."""
    constant = torch.tensor([1.0, -2.0], dtype=torch.float64)[None, :, None, None]
    x = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    for method in ("euler", "heun", "heun_euler"):
        grid = torch.tensor([0, 0.1, 0.17, 0.6, 1.0], dtype=torch.float64)
        end = integrate(
            lambda x, tau, y: constant.expand_as(x), offset(NAMES, 0.37, ROLES), x, torch.zeros(1), grid, method,
            channels=(1, 1),
        )  # fmt: skip
        assert torch.allclose(end, constant, atol=1e-12)


def test_the_last_step_by_euler_leaves_no_noise():
    """All data are zero: v = -x / (1 - tau), and 0 where no noise is left to predict.  Heun keeps half of the last
    step's noise, each representation at its own end."""
    x = torch.randn(8, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def velocity(x, tau, y):
        rest = 1 - tau[:, :, None, None]
        return torch.where(rest > 1e-6, -x / rest.clamp(min=1e-6), 0.0)

    calls = []

    def run(method, schedule):
        def counted(x, tau, y):
            calls.append(1)
            return velocity(x, tau, y)

        return integrate(counted, schedule, x, torch.zeros(8), time_grid(schedule, 10, 1.5), method, channels=(1, 1))

    for schedule in (synchronous(NAMES), offset(NAMES, 0.3, ROLES), power(NAMES, 3, ROLES)):
        assert run("heun", schedule).abs().amax((0, 2, 3)).min() > 1e-3
        calls.clear()
        assert run("heun_euler", schedule).abs().max() < 1e-12
        assert len(calls) == evaluations("heun_euler", 10) == 19


def test_time_grid():
    straight = synchronous(NAMES)
    assert torch.equal(time_grid(straight, 8), uniform_grid(8))
    grid = time_grid(straight, 8, 2.0)
    assert grid[0] == 0
    assert grid[-1] == 1
    assert bool((grid.diff().diff() < 0).all())


@pytest.mark.parametrize("schedule", [synchronous(NAMES), offset(NAMES, 0.3, ROLES), power(NAMES, 3, ROLES)])
def test_the_last_step_is_as_long_along_every_schedule(schedule):
    grid = time_grid(schedule, 6, last_step=0.12)
    assert len(grid) == 7
    assert grid[-1] == 1
    last = 1 - schedule(grid[-2]).tau
    assert float(last.max()) == pytest.approx(0.12, abs=1e-9)
    torch.testing.assert_close(grid[:-1].diff(), (grid[-2] / 5).expand(5))  # the others divide the rest
    assert torch.equal(time_grid(schedule, 1, last_step=0.12), uniform_grid(1))


def test_one_steps_noise_does_not_depend_on_the_schedule():
    """Images that are one point: what heun's last step leaves is half of it, whatever the schedule's slope."""
    x = torch.randn(8, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def velocity(x, tau, y):  # of the point 0: where noise is left it is (0 - x) / (1 - tau), at tau = 1 nothing is
        left = (1 - tau)[:, :, None, None]
        return torch.where(left > 1e-9, -x / left.clamp(min=1e-12), 0.0)

    for schedule in (synchronous(NAMES), power(NAMES, 3, ROLES)):
        grid = time_grid(schedule, 10, last_step=0.12)
        end = integrate(velocity, schedule, x, torch.zeros(8), grid, "heun", channels=(1, 1))
        torch.testing.assert_close(end[:, 0], 0.06 * x[:, 0])


def network(offset_value):
    return lambda x, tau, y: x * offset_value + y[:, None, None, None] + tau.mean(1)[:, None, None, None]


def test_guidance_identities():
    x = torch.randn(4, 5, 2, 2, generator=torch.Generator().manual_seed(0))
    tau = torch.tensor([[0.2, 0.6]]).expand(4, 2)
    y = torch.arange(4)
    main, weak = network(1.0), network(0.5)
    unguided = guided(main, scale=(1.0, 1.0), weak=weak)(x, tau, y)
    assert unguided.weak is None
    assert torch.equal(unguided.v, main(x, tau, y))
    unguided = guided(main, scale=(1.0, 1.0), null_class=9)(x, tau, y)
    assert unguided.weak is None
    assert torch.equal(unguided.v, main(x, tau, y))
    outside = guided(main, scale=(3.0, 3.0), interval=(0.8, 0.9), weak=weak)(x, tau, y)
    assert outside.weak is None
    # scale 0 is the weak model; an interval guides only the representation whose own time is inside
    steps = uniform_grid(3)
    arguments = (synchronous(NAMES), x, y, steps)
    zero = integrate(guided(main, scale=(0.0, 0.0), weak=weak), *arguments, channels=(3, 2))
    assert torch.allclose(zero, integrate(weak, *arguments, channels=(3, 2)), atol=1e-6)
    partial = guided(main, scale=(2.0, 2.0), interval=(0.5, 1.0), weak=weak)(x, tau, y)
    assert torch.equal(partial.scale, torch.tensor([[1.0, 2.0]]).expand(4, 2))
    cfg = guided(main, scale=(2.0, 2.0), null_class=9)(x, tau, y)
    assert torch.allclose(cfg.v, main(x, tau, y))
    assert torch.allclose(cfg.weak, main(x, tau, torch.full_like(y, 9)))
    with pytest.raises(ValueError, match="either"):
        guided(main, scale=(1.0,))


def test_guided_increment_is_the_formula():
    x, v, weak = torch.randn(3, 2, 5, 2, 2, generator=torch.Generator().manual_seed(1)).unbind(0)
    scale = torch.tensor([[1.5, 3.0]]).expand(2, 2)
    end = integrate(
        lambda x, tau, y: Velocity(v, weak, scale), synchronous(NAMES), x, torch.zeros(2), uniform_grid(1), "euler",
        channels=(3, 2),
    )  # fmt: skip
    gain = torch.tensor([1.5] * 3 + [3.0] * 2)[None, :, None, None]
    assert torch.allclose(end, x + weak + gain * (v - weak), atol=1e-6)


@pytest.mark.parametrize("method", ["euler", "heun", "dopri5"])
def test_images_do_not_depend_on_the_batch_size(method):
    def make(indices):
        labels = sample_labels(indices, range(10), "random", seed=3)
        return generate_latents(
            network(-0.7), power(NAMES, 3, ROLES), indices, labels, channels=(3, 2), side=2,
            grid=uniform_grid(4), method=method, seed=7,
        )  # fmt: skip

    runs = [torch.cat([make(part) for part in batches(100, batch, method)])[:100] for batch in (7, 32, 100)]
    assert torch.allclose(runs[0], runs[1], atol=1e-6)
    assert torch.allclose(runs[0], runs[2], atol=1e-6)


def test_labels():
    indices = torch.arange(1000)
    balanced = sample_labels(indices, range(10), "balanced", 0)
    assert torch.equal(balanced.bincount(), torch.full((10,), 100))
    assert torch.equal(sample_labels(indices, [4, 7], "balanced", 0).unique(), torch.tensor([4, 7]))
    drawn = sample_labels(indices, range(10), "random", 0)
    assert int(drawn.bincount(minlength=10).min()) > 60
    assert torch.equal(drawn[500:], sample_labels(indices[500:], range(10), "random", 0))


def test_generation_continues_after_an_interruption_and_spreads_over_ranks(tmp_path):
    calls = []

    def make(indices):
        if len(calls) == 2 and not (tmp_path / "go").exists():
            raise KeyboardInterrupt
        calls.append(indices)
        images = (indices[:, None, None, None] % 256).to(torch.uint8).expand(-1, 1, 4, 4)
        return images, indices % 10, len(indices)

    parts = list(batches(25, 8, "heun"))
    with pytest.raises(KeyboardInterrupt):
        generate_images(make, parts, 25, tmp_path / "a", progress=False)
    (tmp_path / "go").touch()
    path = generate_images(make, parts, 25, tmp_path / "a", progress=False)
    assert len(calls) == 4, "the two finished batches were kept"
    with np.load(path) as arrays:
        assert arrays["arr_0"].shape == (25, 4, 4, 3)
        assert arrays["arr_0"].dtype == np.uint8
        assert np.array_equal(arrays["arr_0"][:, 0, 0, 0], np.arange(25))
        assert np.array_equal(arrays["labels"], np.arange(25) % 10)
        assert np.array_equal(arrays["evaluations"], [8, 8, 8, 1])
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["samples.npz"]
    (tmp_path / "go").unlink()
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        generate_images(make, parts, 25, tmp_path / "c", progress=False)
    (tmp_path / "go").touch()
    other = generate_images(make, list(batches(25, 10, "heun")), 25, tmp_path / "c", progress=False)
    assert np.array_equal(np.load(other)["arr_0"], np.load(path)["arr_0"]), "continued with another batch size"
    assert [file.name for file in (tmp_path / "c").iterdir()] == ["samples.npz"]
    for rank in (1, 0):
        spread = generate_images(make, parts, 25, tmp_path / "b", rank=rank, world=2, progress=False)
    assert np.array_equal(np.load(spread)["arr_0"], np.load(path)["arr_0"])
