"""FusedAdamW in PyTorch, in C++ and in CUDA against torch's AdamW, clip_grad_norm_ and an EMA in float64."""

import copy
import io
import warnings
from typing import Any

import pytest
import torch

from fastasync.errors import UserError
from fastasync.optim import FusedAdamW, build_optimizer, library

SHAPES = [(), (0,), (1,), (3, 5), (16384,), (16385,), (7, 2341), (5000, 1), (2, 3, 4, 5), (33000,)]
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1, "ema_decay": 0.95}


def draw(shapes, seed, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * scale).to(dtype) for shape in shapes]


def parameters(values, device="cpu", dtype=None):
    return [torch.nn.Parameter(value.to(device=device, dtype=dtype or value.dtype, copy=True)) for value in values]


class Reference:
    """torch.optim.AdamW with clipping and an EMA, at the precision of the given weights."""

    def __init__(self, values, dtype, **options):
        options = dict(options)
        self.decay = options.pop("ema_decay")
        self.params = [torch.nn.Parameter(value.to(dtype)) for value in values]
        self.optimizer = torch.optim.AdamW(self.params, foreach=False, fused=False, **options)
        self.ema = [p.detach().clone() for p in self.params]
        self.norm = torch.zeros(())

    def step(self, grads, max_norm):
        for p, grad in zip(self.params, grads):
            p.grad = None if grad is None else grad.to(p.dtype, copy=True)  # clipping is in place
        if max_norm is not None:
            self.norm = torch.nn.utils.clip_grad_norm_(self.params, max_norm)
        self.optimizer.step()
        for p, ema in zip(self.params, self.ema):
            ema.lerp_(p.detach(), 1 - self.decay)

    def result(self):
        state = self.optimizer.state
        found = {"weights": self.params, "ema": self.ema}
        for name in ("exp_avg", "exp_avg_sq"):
            found[name] = [state[p][name] for p in self.params if p in state]
        return found


def flat(tensors):
    return torch.cat([tensor.detach().double().cpu().reshape(-1) for tensor in tensors])


def error(tensors, exact):
    return float((flat(tensors) - flat(exact)).norm() / flat(exact).norm())


def set_grads(params, grads):
    for p, grad in zip(params, grads):
        p.grad = None if grad is None else grad.to(p.device, copy=True)


def everything(optimizer, params):
    """All numbers that a step may change, as clones."""
    state = [tensor.clone() for p in params for _, tensor in sorted(optimizer.state.get(p, {}).items())]
    return [p.detach().clone() for p in params] + state


def assert_bitwise(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert a.dtype == b.dtype
        assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [None, 150.0])
def test_fifty_steps_against_float64(place, dtype, max_norm):
    device, native = place
    values = draw(SHAPES, seed=1)
    params = parameters(values, device, dtype)
    optimizer = FusedAdamW(params, native=native, **OPTIONS)
    optimizer.init_state(masters=[value.to(device) for value in values])
    exact, same = Reference(values, torch.float64, **OPTIONS), Reference(values, torch.float32, **OPTIONS)
    clipped = 0
    for i in range(50):
        grads = draw(SHAPES, seed=100 + i, scale=0.1 * (i % 9), dtype=dtype)  # norms from 0 to 235
        set_grads(params, grads)
        exact.step(grads, max_norm)
        same.step(grads, max_norm)
        if max_norm is None:
            optimizer.step()
        else:
            norm = optimizer.clip_and_step(max_norm)
            assert float(norm) == pytest.approx(float(exact.norm), rel=1e-6)
            clipped += float(norm) > max_norm
    assert max_norm is None or 10 < clipped < 40
    state = [optimizer.state[p] for p in params]
    ours = {name: [part[name] for part in state] for name in ("exp_avg", "exp_avg_sq", "ema")}
    ours["weights"] = [part.get("master", p) for part, p in zip(state, params)]
    wanted, budget = exact.result(), same.result()
    for name, tensors in ours.items():
        assert all(tensor.dtype == torch.float32 for tensor in tensors)
        assert error(tensors, wanted[name]) <= 2 * error(budget[name], wanted[name]), name
    assert all(float(part["step"]) == 50 for part in state)
    if dtype == torch.bfloat16:
        assert_bitwise([p.detach() for p in params], [part["master"].to(dtype) for part in state])
    else:
        assert not any("master" in part for part in state)


def test_one_step_of_both_paths_agrees_to_rounding(libraries, monkeypatch):
    monkeypatch.setattr(library, "load", libraries.get)
    found = []
    for native in (False, True):
        params = parameters(draw(SHAPES, seed=2))
        optimizer = FusedAdamW(params, native=native, **OPTIONS)
        assert optimizer.backend == ("cpu" if native else "torch")
        for i in range(3):
            set_grads(params, draw(SHAPES, seed=3 + i))
            optimizer.clip_and_step(100.0)
        found.append(everything(optimizer, params))
    ulp = torch.finfo(torch.float32).eps
    for a, b in zip(*found):
        if a.numel():
            # weights near zero cancel, so the yardstick is the rounding of the tensor's largest number, once per step
            assert float((a - b).abs().max()) <= 3 * ulp * float(b.abs().max())
            assert float((a - b).norm()) <= ulp * float(b.norm())


def test_frozen_and_absent_gradients_are_left_alone(place):
    device, native = place
    params = parameters(draw([(4, 4), (4,), (9,)], seed=4), device)
    params[0].requires_grad_(False)
    before = [p.detach().clone() for p in params]
    optimizer = FusedAdamW(params, native=native, **OPTIONS)
    for i in range(3):
        set_grads(params, [None, None, *draw([(9,)], seed=i)])
        optimizer.clip_and_step(1.0)
    assert torch.equal(params[0], before[0])
    assert torch.equal(params[1], before[1])
    assert not torch.equal(params[2], before[2])
    assert set(optimizer.ema_state()) == {params[2]}
    # a parameter that joins later counts its own steps
    set_grads(params, [None, *draw([(4,), (9,)], seed=9)])
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params[1:]] == [1, 4]
    late = Reference([before[1].cpu()], torch.float64, **OPTIONS)
    late.step(draw([(4,)], seed=9), None)
    torch.testing.assert_close(params[1].detach().cpu().double(), late.params[0].detach(), rtol=1e-6, atol=1e-7)


def test_no_gradient_at_all(place):
    device, native = place
    optimizer = FusedAdamW(parameters(draw([(3,)], seed=5), device), native=native, **OPTIONS)
    assert float(optimizer.clip_and_step(1.0)) == 0
    optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("impl", ["fused", "torch"])
def test_no_gradient_and_an_empty_group(place, impl):
    """As a rank's shard may be; the others wait in ``combine``, for a number on the parameters' device."""
    device, native = place
    groups = [{"params": []}, {"params": parameters(draw([(3,)], seed=5), device)}]
    optimizer = FusedAdamW(groups, native=native) if impl == "fused" else build_optimizer(groups, impl)
    seen = []
    total = optimizer.clip_and_step(1.0, combine=lambda norm: seen.append(norm) or norm + 7)
    assert (float(total), [(float(norm), norm.device.type) for norm in seen]) == (7, [(0, device)])
    nothing = build_optimizer([{"params": []}, {"params": []}], impl)
    assert float(nothing.clip_and_step(1.0)) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_skips_the_step(place, bad):
    device, native = place
    params = parameters(draw(SHAPES, seed=6), device)
    optimizer = FusedAdamW(params, native=native, **OPTIONS)
    set_grads(params, draw(SHAPES, seed=7))
    optimizer.clip_and_step(1.0)
    before = everything(optimizer, params)
    grads = draw(SHAPES, seed=8)
    grads[5][16384] = bad  # the lone element of a last chunk
    set_grads(params, grads)
    norm = optimizer.clip_and_step(1.0)
    assert not torch.isfinite(norm)
    assert optimizer.grad_norm is norm
    assert_bitwise(everything(optimizer, params), before)
    set_grads(params, draw(SHAPES, seed=8))
    assert torch.isfinite(optimizer.clip_and_step(1.0))
    assert float(optimizer.state[params[0]]["step"]) == 2


@pytest.mark.parametrize("max_norm", [None, 50.0])
def test_two_shards_are_updated_as_the_whole(place, max_norm):
    """Each combines its gradients' norm with the other's, as ZeRO's ranks do; one that is not finite stops both."""
    device, native = place
    values = draw([(16385,), (700,)], seed=40)
    whole, *halves = (
        FusedAdamW(parameters(part, device), native=native, **OPTIONS) for part in (values, values[:1], values[1:])
    )
    for seed, bad in ((41, None), (42, float("inf")), (43, None)):
        grads = draw([(16385,), (700,)], seed=seed)
        if bad:
            grads[1][3] = bad
        for optimizer, part in zip((whole, *halves), (grads, grads[:1], grads[1:])):
            set_grads(optimizer.param_groups[0]["params"], part)
        total = torch.cat(grads).norm().to(device)
        norms = [each.clip_and_step(max_norm, combine=lambda norm, total=total: total) for each in halves]
        torch.testing.assert_close(norms, [whole.clip_and_step(max_norm)] * 2)
    for half, wanted in zip(halves, whole.param_groups[0]["params"]):
        (p,) = half.param_groups[0]["params"]
        torch.testing.assert_close(p, wanted, rtol=1e-6, atol=1e-8)
        assert float(half.state[p]["step"]) == float(whole.state[wanted]["step"]) == 2


def test_gradient_scale_is_the_same_as_scaled_gradients(place):
    device, native = place
    found = []
    for scale in (1.0, 0.25):
        params = parameters(draw(SHAPES, seed=10), device)
        optimizer = FusedAdamW(params, native=native, **OPTIONS)
        set_grads(params, draw(SHAPES, seed=11, scale=1 / scale))
        norm = optimizer.clip_and_step(50.0, grad_scale=scale)
        set_grads(params, draw(SHAPES, seed=12, scale=1 / scale))
        optimizer.step(grad_scale=scale)
        found.append([norm, *everything(optimizer, params)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trip_continues_bitwise(place, dtype):
    device, native = place
    params = parameters(draw(SHAPES, seed=13), device, dtype)
    optimizer = FusedAdamW(params, native=native, **OPTIONS)

    def run(optimizer, params, first, last):
        for i in range(first, last):
            set_grads(params, draw(SHAPES, seed=20 + i, dtype=dtype))
            optimizer.clip_and_step(100.0)

    run(optimizer, params, 0, 5)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": [p.detach() for p in params]}, file)
    run(optimizer, params, 5, 10)
    file.seek(0)
    saved = torch.load(file, map_location="cpu", weights_only=True)
    resumed = parameters(saved["params"], device)
    other = FusedAdamW(resumed, native=native, **{**OPTIONS, "lr": 3.0})
    other.load_state_dict(saved["optimizer"])
    kept = copy.deepcopy(saved)
    run(other, resumed, 5, 10)
    assert_bitwise(everything(other, resumed), everything(optimizer, params))
    for key, state in saved["optimizer"]["state"].items():  # no alias of what was loaded
        assert_bitwise(list(state.values()), list(kept["optimizer"]["state"][key].values()))


def test_state_moves_between_the_paths(libraries, monkeypatch):
    monkeypatch.setattr(library, "load", libraries.get)
    params = parameters(draw(SHAPES, seed=14))
    optimizer = FusedAdamW(params, native=True, **OPTIONS)
    set_grads(params, draw(SHAPES, seed=15))
    optimizer.step()
    plain = parameters([p.detach() for p in params])
    other = FusedAdamW(plain, native=False, **OPTIONS)
    other.load_state_dict(optimizer.state_dict())
    for part, group in ((optimizer, params), (other, plain)):
        set_grads(group, draw(SHAPES, seed=16))
        part.step()
    assert float(other.state[plain[0]]["step"]) == 2
    assert error(everything(other, plain), everything(optimizer, params)) < 1e-7


def test_results_do_not_depend_on_the_number_of_threads(libraries, monkeypatch):
    monkeypatch.setattr(library, "load", libraries.get)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        params = parameters(draw(SHAPES, seed=17))
        optimizer = FusedAdamW(params, native=True, **OPTIONS)
        set_grads(params, draw(SHAPES, seed=18))
        found.append([optimizer.clip_and_step(10.0).clone(), *everything(optimizer, params)])
    assert_bitwise(*found)


def test_parameter_groups_keep_their_own_settings(place):
    device, native = place
    values = draw([(6, 3), (5,), (4,)], seed=19)
    params = parameters(values, device)
    special = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    groups = [{"params": params[:1]}, {"params": params[1:2], "ema_decay": None, **special}]
    optimizer = FusedAdamW(groups, native=native, **OPTIONS)
    optimizer.add_param_group({"params": params[2:], "ema_decay": 0.5})
    settings = [OPTIONS, {"ema_decay": 0.0, **special}, {**OPTIONS, "ema_decay": 0.5}]
    exact = [Reference([value], torch.float64, **part) for value, part in zip(values, settings)]
    for i in range(5):
        grads = draw([(6, 3), (5,), (4,)], seed=30 + i)
        set_grads(params, grads)
        optimizer.step()
        for part, grad in zip(exact, grads):
            part.step([grad], None)
    for p, part in zip(params, exact):
        torch.testing.assert_close(p.detach().cpu().double(), part.params[0].detach(), rtol=1e-6, atol=1e-7)
    assert "ema" not in optimizer.state[params[1]]
    for i in (0, 2):
        ema = optimizer.state[params[i]]["ema"].cpu().double()
        torch.testing.assert_close(ema, exact[i].ema[0], rtol=1e-6, atol=1e-7)


def test_learning_rate_as_a_tensor_and_under_a_scheduler(place):
    device, native = place
    found = []
    for as_tensor in (False, True):
        params = parameters(draw([(20,)], seed=40), device)
        lr = torch.tensor(0.5, device=device) if as_tensor else 0.5
        optimizer = FusedAdamW(params, **{**OPTIONS, "lr": lr}, native=native)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a scheduler that missed our step would warn
            for i in range(3):
                set_grads(params, draw([(20,)], seed=41 + i))
                optimizer.clip_and_step(1.0)
                schedule.step()
        assert float(optimizer.param_groups[0]["lr"]) == 0.0625
        found.append(everything(optimizer, params))
    assert_bitwise(*found)


def test_memory_orders(place):
    """A channels-last weight, a transposed gradient and tensors that are not 16-byte aligned."""
    device, native = place
    values = draw([(4, 3, 5, 6), (6, 7), (1000,)], seed=50)
    grads = draw([(4, 3, 5, 6), (6, 7), (1000,)], seed=51)
    plain = parameters(values, device)
    odd = [
        torch.nn.Parameter(values[0].to(device).to(memory_format=torch.channels_last)),
        torch.nn.Parameter(values[1].to(device)),
        torch.nn.Parameter(torch.empty(1001, device=device)[1:].copy_(values[2])),
    ]
    found = []
    for params, layout in ((plain, False), (odd, True)):
        optimizer = FusedAdamW(params, native=native, **OPTIONS)
        for _ in range(2):
            set_grads(params, [grads[0], grads[1].t().contiguous().t() if layout else grads[1], grads[2]])
            optimizer.step()
        found.append(everything(optimizer, params))
    for a, b in zip(*found):  # contiguous copies: strides differ, numbers must not
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_tensors_replaced_between_steps_are_noticed(place):
    """State put in from outside, weights moved, a gradient in another order, state of another dtype."""
    device, native = place
    grads = draw([(6, 7), (30,)], seed=53)
    found = []
    for meddle in (False, True):
        params = parameters(draw([(6, 7), (30,)], seed=52), device)
        optimizer = FusedAdamW(params, native=native, **OPTIONS)
        for i in range(6):
            set_grads(params, grads)
            if meddle and i == 2:
                for name in ("exp_avg", "exp_avg_sq", "ema", "step"):
                    optimizer.state[params[0]][name] = optimizer.state[params[0]][name].clone()
            if meddle and i == 3:
                optimizer.state[params[0]]["ema"].data = optimizer.state[params[0]]["ema"].data.clone()
                params[1].data = params[1].data.clone()
            if meddle and i == 4:
                params[0].grad = params[0].grad.t().contiguous().t()
            optimizer.clip_and_step(3.0)
        found.append(everything(optimizer, params))
        state = optimizer.state[params[0]]
        state["exp_avg"] = state["exp_avg"].double()
        if native:
            with pytest.raises(UserError, match="float64"):
                optimizer.step()
    assert_bitwise(*found)


def test_a_parameter_with_gaps_is_refused(libraries, monkeypatch):
    monkeypatch.setattr(library, "load", libraries.get)
    p = torch.nn.Parameter(torch.zeros(4, 8)[:, ::2])
    p.grad = torch.ones(4, 4)
    with pytest.raises(UserError, match="contiguous"):
        FusedAdamW([p], native=True).step()


def test_autograd_notices_the_update(place):
    device, native = place
    p = torch.nn.Parameter(torch.ones(3, device=device))
    loss = (p * p).sum()
    p.grad = torch.ones_like(p)
    FusedAdamW([p], native=native).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_closure(place):
    device, native = place
    p = torch.nn.Parameter(torch.full((3,), 2.0, device=device))
    optimizer = FusedAdamW([p], lr=0.1, native=native)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 12
    torch.testing.assert_close(p.detach().cpu(), torch.full((3,), 1.9))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": float("inf")}, "weight_decay"),
        ({"ema_decay": 1.0}, "ema_decay"),
    ],
)
def test_settings_out_of_range(options, field):
    with pytest.raises(UserError, match=rf"optimizer\.{field}"):
        FusedAdamW([torch.nn.Parameter(torch.zeros(2))], **options)


def test_bad_input(libraries, monkeypatch):
    p = torch.nn.Parameter(torch.zeros(5, 2))
    optimizer = FusedAdamW([p], **OPTIONS)
    with pytest.raises(UserError, match="max_norm"):
        optimizer.clip_and_step(0.0)
    p.grad = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1, 2), (5, 2), check_invariants=True)
    with pytest.raises(UserError, match="sparse"):
        optimizer.step()
    p.grad = torch.ones(5, 2)
    optimizer.step()
    other = FusedAdamW([torch.nn.Parameter(torch.zeros(2, 5))], **OPTIONS)
    with pytest.raises(UserError, match=r"shape \[2, 5\]"):
        other.load_state_dict(optimizer.state_dict())
    monkeypatch.setattr(library, "load", lambda kind: None)
    with pytest.raises(UserError, match="nvcc"):
        FusedAdamW([p], native=True)
    monkeypatch.setattr(library, "load", libraries.get)
    with pytest.raises(UserError, match="float32 or bfloat16"):
        FusedAdamW([p.detach().double().requires_grad_()], native=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph_replay_equals_eager(libraries, monkeypatch):
    monkeypatch.setattr(library, "load", libraries.get)
    found = []
    for captured in (False, True):
        params = parameters(draw(SHAPES, seed=60), "cuda", torch.bfloat16)
        optimizer = FusedAdamW(params, native=True, **OPTIONS)
        optimizer.init_state()
        set_grads(params, [torch.zeros_like(p) for p in params])
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                norm = optimizer.clip_and_step(50.0)
        for i in range(4):
            for p, grad in zip(params, draw(SHAPES, seed=61 + i, dtype=torch.bfloat16)):
                p.grad.copy_(grad if i != 2 else grad * float("nan"))
            if captured:
                graph.replay()
            else:
                norm = optimizer.clip_and_step(50.0)
        found.append([norm.clone(), *everything(optimizer, params)])
    assert float(optimizer.state[params[0]]["step"]) == 3
    assert_bitwise(*found)
