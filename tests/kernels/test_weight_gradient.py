"""The weight's gradient in parts: against fp64, against F.linear, compiled; what is chosen, and errors."""

import pytest
import torch
import torch.nn.functional as F
from fastasync_kernels import weight_gradient as module

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def draw(dtype, weight_dtype=None):
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 6, 32), (48, 32), (48,), (4, 6, 48)]
    x, weight, bias, g = (torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    leaves = [x, weight.to(weight_dtype or dtype), bias.to(weight_dtype or dtype)]
    return [leaf.requires_grad_() for leaf in leaves], g


def run(function, leaves, g):
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, g.to(out.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_no_worse_than_twice_the_undivided_product(parts, dtype, no_worse):
    leaves, g = draw(dtype)
    truth = run(F.linear, [leaf.detach().double().requires_grad_() for leaf in leaves], g.double())
    ours = run(lambda *a: module.linear(*a, parts), leaves, g)
    no_worse(ours, run(F.linear, leaves, g), truth, ["y", "dx", "dw", "db"])


@pytest.mark.parametrize("parts", [1, 2])
def test_float32_weights_are_rounded_as_autocast_does(parts):
    leaves, g = draw(torch.bfloat16, torch.float32)
    ours = run(lambda *a: module.linear(*a, parts), leaves, g)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = F.linear(*leaves)
    theirs = [out.detach(), *torch.autograd.grad(out, leaves, g)]
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    same = [torch.equal(a, b) for a, b in zip(ours, theirs)]
    assert same == [True, True, parts == 1, True]


def test_only_what_is_asked_for():
    (x, weight, _), g = draw(torch.float32)
    weight.requires_grad_(False)
    y = module.linear(x, weight, None, 2)
    torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], g @ weight)


def test_compiled_equals_eager():
    leaves, g = draw(torch.bfloat16)
    compiled = torch.compile(module.linear, fullgraph=True, backend="inductor" if CUDA else "aot_eager")
    eager, other = (run(lambda *a, f=f: f(*a, 2), leaves, g) for f in (module.linear, compiled))
    for a, b in zip(eager, other):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-3)


def test_parts_that_do_not_divide_are_an_error():
    leaves, _ = draw(torch.float32)
    with pytest.raises(ValueError, match="parts 5 must divide the 24 rows of x"):
        module.linear(*leaves, 5)


def test_the_fastest_is_chosen_where_it_is_clearly_faster(monkeypatch):
    times = {}
    monkeypatch.setattr(module, "_measure", lambda *a: dict(times))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "pretended GPU")
    monkeypatch.setattr(module, "_choices", {})

    def chosen(outputs, **found):
        times.update({int(name[1:]): ms for name, ms in found.items()})
        return module.choose_parts(65536, outputs, 1152, torch.bfloat16, torch.device("cuda"))

    assert chosen(6144, p1=1.55, p2=1.43, p4=1.46) == 2
    assert chosen(6144, p1=1.0, p2=9.0, p4=9.0) == 2  # measured once
    assert chosen(3456, p1=0.74, p2=0.83, p4=0.73) == 1  # 1 % is not worth another rounding
    assert chosen(16, p1=1.0, p2=0.1, p4=0.1) == 1  # too small to measure
    assert module.choose_parts(65536, 6144, 1152, torch.bfloat16, torch.device("cpu")) == 1


@pytest.mark.gpu
def test_a_measurement():
    assert module.choose_parts(4096, 2048, 1024, torch.bfloat16, torch.device("cuda")) in module.PARTS
