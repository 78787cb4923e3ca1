"""The network: sizes, shapes, initialisation, and its numerics against a plain evaluation of the published formulas."""

import copy
import pickle
from itertools import pairwise

import fastasync_kernels
import pytest
import torch
from fastasync_kernels import reference
from torch import Tensor

from fastasync.errors import UserError
from fastasync.model import SIZES, LightningDiT, parameter_count
from fastasync.model.dit import Ops


def expected_parameters(depth: int, width: int, heads: int, patch: int, grid: int, repa: bool) -> int:
    """The published layers added up by hand, for channels (32, 16) and 1000 classes."""
    hidden, head, pixels = 8 * width // 3, width // heads, 48 * patch * patch
    attention = width * 3 * width + 3 * width + 2 * head + width * width + width
    mlp = width * 2 * hidden + 2 * hidden + hidden * width + width
    block = 2 * width + attention + mlp + width * 6 * width + 6 * width
    half = width // 2
    times = 2 * (256 * half + half + half * half + half)
    final = width + width * pixels + pixels + width * 2 * width + 2 * width
    projector = width * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 768 + 768
    total = depth * block + pixels * width + width + times + 1001 * width + final + (grid // patch) ** 2 * width
    return total + (projector if repa else 0)


def big(size: str, patch: int, repa_width: int | None = 768) -> LightningDiT:
    with torch.device("meta"):
        return LightningDiT(
            channels=(32, 16),
            names=("texture", "semantic"),
            grid=16,
            classes=1000,
            patch=patch,
            repa_width=repa_width,
            **SIZES[size]._asdict(),
        )


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_the_right_parameter_count(size, patch):
    assert parameter_count(big(size, patch)) == expected_parameters(*SIZES[size], patch, 16, repa=True)


def test_xl_counts_what_was_published():
    assert parameter_count(big("XL", 1)) == 682_765_424  # 682.77M with the projector
    assert parameter_count(big("XL", 1, None)) == expected_parameters(*SIZES["XL"], 1, 16, repa=False)


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_forward_shapes(build, batch, count, patch):
    model = build(count, patch=patch, repa_width=12)
    x, tau, y = batch(model)
    v, repa = model(x, tau, y, return_repa=True)
    assert (v.shape, v.dtype) == (x.shape, torch.float32)
    assert (repa.shape, repa.dtype) == ((3, (4 // patch) ** 2, 12), torch.float32)
    assert torch.equal(model(x, tau, y), v)


def test_meta_forward_of_a_published_size():
    model = big("B", 1)
    x = torch.empty(2, 48, 16, 16, device="meta")
    v = model(x, torch.empty(2, 2, device="meta"), torch.empty(2, device="meta", dtype=torch.int64))
    assert v.shape == x.shape


def rotations(side: int, head: int) -> Tensor:
    """RoPE as complex numbers [tokens, head / 2]: the first half of a head turns by row, the second by column."""
    frequency = 10_000.0 ** (-torch.arange(0, head // 2, 2, dtype=torch.float64) / (head // 2))
    index = torch.arange(side * side, dtype=torch.float64)
    rows, columns = torch.div(index, side, rounding_mode="floor"), index % side
    angle = torch.cat([rows[:, None] * frequency, columns[:, None] * frequency], 1)
    return torch.polar(torch.ones_like(angle), angle)


def published_forward(
    state: dict[str, Tensor], x: Tensor, tau: Tensor, y: Tensor, times: list[tuple[str, int]], heads: int, patch: int
) -> tuple[Tensor, Tensor]:
    """Velocity and tokens after block 2, token by token arithmetic from the published formulas and names."""

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, value: Tensor) -> Tensor:
        return value / (value.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]

    def silu(value: Tensor) -> Tensor:
        return value / (1 + (-value).exp())

    batch, channels, side = x.shape[0], x.shape[1], x.shape[2] // patch
    kernel, bias = state["x_embedder.proj.weight"], state["x_embedder.proj.bias"]
    tokens = []
    for row in range(side):
        for column in range(side):
            piece = x[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            tokens.append(torch.einsum("bcpq,dcpq->bd", piece, kernel) + bias)
    stream = torch.stack(tokens, 1) + state["pos_embed"]
    width = stream.shape[-1]
    head = width // heads

    conditions = []
    for name, k in times:
        frequency = 10_000.0 ** (-torch.arange(128, dtype=x.dtype) / 128)
        angle = tau[:, k, None] * frequency
        hidden = linear(f"{name}.mlp.0", torch.cat([angle.cos(), angle.sin()], 1))
        conditions.append(linear(f"{name}.mlp.2", silu(hidden)))
    condition = torch.cat(conditions, 1) + state["y_embedder.embedding_table.weight"][y]

    turn = rotations(side, head)

    def rotate(value: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(value.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    after_two = stream
    for index_ in range(depth):
        block = f"blocks.{index_}"
        modulation = linear(f"{block}.adaLN_modulation.1", silu(condition))[:, None].split(width, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        packed = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", stream) * (1 + scale1) + shift1)
        outputs = []
        for h in range(heads):
            q, k, v = (packed[..., part * width + h * head : part * width + (h + 1) * head] for part in range(3))
            q, k = rotate(norm(f"{block}.attn.q_norm", q)), rotate(norm(f"{block}.attn.k_norm", k))
            scores = (q @ k.transpose(1, 2) / head**0.5).exp()
            outputs.append(scores / scores.sum(-1, keepdim=True) @ v)
        stream = stream + gate1 * linear(f"{block}.attn.proj", torch.cat(outputs, -1))
        a, b = linear(f"{block}.mlp.w12", norm(f"{block}.norm2", stream) * (1 + scale2) + shift2).chunk(2, -1)
        stream = stream + gate2 * linear(f"{block}.mlp.w3", silu(a) * b)
        after_two = stream if index_ == 1 else after_two
    shift, scale = linear("final_layer.adaLN_modulation.1", silu(condition))[:, None].chunk(2, -1)
    pixels = linear("final_layer.linear", norm("final_layer.norm_final", stream) * (1 + scale) + shift)
    v = torch.empty(batch, channels, side * patch, side * patch, dtype=x.dtype)
    for row in range(side * patch):
        for column in range(side * patch):
            token = (row // patch) * side + column // patch
            start = ((row % patch) * patch + column % patch) * channels
            v[:, :, row, column] = pixels[:, token, start : start + channels]
    return v, after_two


TIMES = {
    1: [("t_embedder", 0)],
    2: [("t_embedder_sem", 1), ("t_embedder_tex", 0)],
    3: [("t_embedder_sem", 2), ("t_embedder_lowfreq", 1), ("t_embedder_tex", 0)],
}


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_numerics_against_a_plain_evaluation(build, batch, count, patch):
    model = build(count, patch=patch, repa_width=12).double()
    x, tau, y = batch(model)
    turn = rotations(4 // patch, model.width // model.heads)
    for table, exact in ((model.feat_rope.freqs_cos, turn.real), (model.feat_rope.freqs_sin, turn.imag)):
        torch.testing.assert_close(table, exact.repeat_interleave(2, 1), rtol=0, atol=1e-7)
        table.copy_(exact.repeat_interleave(2, 1))  # stored in float32; with the exact ones the rest is exact too
    state = dict(model.state_dict())
    expected, tokens = published_forward(state, x, tau, y, TIMES[count], model.heads, patch)
    v, repa = model(x, tau, y, return_repa=True)
    torch.testing.assert_close(v, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(repa, model.repa_projector(tokens), rtol=1e-10, atol=1e-10)
    assert expected.std() > 0.1


def test_time_widths_and_order(build):
    model = build(3)
    assert [model.t_embedder_tex.mlp[0].out_features, model.t_embedder_lowfreq.mlp[0].out_features] == [12, 10]
    assert model.t_embedder_sem.mlp[2].out_features == 10


def test_permutation_of_the_batch(build, batch):
    model = build(2).double()
    x, tau, y = batch(model, 5)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(model(x[order], tau[order], y[order]), model(x, tau, y)[order], rtol=0, atol=1e-12)


def test_initial_model(build, batch):
    model = build(2, zero=True, width=128, classes=500, repa_width=12)
    x, tau, y = batch(model)
    assert torch.equal(model(x, tau, y), torch.zeros_like(x))
    state = model.state_dict()
    for name in ("y_embedder.embedding_table", "t_embedder_sem.mlp.0", "t_embedder_tex.mlp.2"):
        assert state[f"{name}.weight"].std() == pytest.approx(0.02, rel=0.05)
    for name, fans in {
        "blocks.1.attn.qkv": 128 + 384,
        "x_embedder.proj": 6 + 128,
        "repa_projector.0": 128 + 2048,
    }.items():
        bound = (6 / fans) ** 0.5  # Xavier: uniform in (-bound, bound)
        weight = state[f"{name}.weight"]
        assert weight.abs().max() <= bound
        assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.08)
    for name, value in state.items():
        if name.endswith("bias") and not name.startswith("t_embedder"):
            assert not value.any(), name
        if "norm" in name:
            assert torch.equal(value, torch.ones_like(value)), name
        if "adaLN" in name or name.startswith("final_layer.linear"):
            assert not value.any(), name


def test_initialisation_is_reproducible_and_works_after_to_empty(build, batch):
    first, second = build(2, zero=True), build(2, zero=True)
    with torch.device("meta"):
        empty = build(2, zero=True)
    empty = empty.to_empty(device="cpu")
    torch.manual_seed(0)
    empty.initialize()
    assert torch.equal(empty.pos_embed, first.pos_embed)
    assert torch.equal(empty.feat_rope.freqs_sin, first.feat_rope.freqs_sin)
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    assert torch.isfinite(empty(*batch(empty))).all()


def test_gradient_of_the_times(build, batch):
    model = build(3, depth=2).double()
    x, tau, y = batch(model, 2)
    tau.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: model(x, t, y).sum(dim=(1, 2, 3)), (tau,), atol=1e-6)
    gradient = torch.autograd.grad(model(x, tau, y).square().sum(), tau)[0]
    assert gradient.dtype == torch.float64
    assert (gradient.abs() > 1e-6).all()


def test_every_weight_gets_a_gradient(build, batch):
    model = build(2, repa_width=12)
    v, repa = model(*batch(model), return_repa=True)
    (v.square().mean() + repa.square().mean()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_autocast_keeps_the_output_float32_and_close(build, batch):
    model = build(2)
    x, tau, y = batch(model)
    exact = model(x, tau, y)
    with torch.autocast("cpu", torch.bfloat16):
        v = model(x, tau, y)
    assert v.dtype == torch.float32
    error = (v - exact).norm() / exact.norm()
    assert 0 < error < 0.03


@pytest.mark.parametrize("autocast", [False, True])
def test_what_the_fused_operations_are_given(build, batch, autocast):
    """Kernels refuse to cast or copy: one dtype, features side by side, per-sample vectors with unit stride."""
    calls, biased = [], []

    def recorded(name):
        def call(*arguments, **options):
            calls.append((name, arguments))
            biased.append(options.get("bias") is not None)
            return getattr(reference, name)(*arguments, **options)

        return call

    model = build(2, patch=2)
    model._ops = Ops(*(recorded(name) for name in Ops._fields[:-3]), sum_bias=True, attention="sdpa", mlp="plain")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(*batch(model))
    assert [name for name, _ in calls[:4]] == ["rmsnorm_modulate", "qknorm_rope", "gated_rmsnorm_modulate", "swiglu"]
    assert len(calls) == 4 * model.depth + 1
    # qkv's, proj's and w12's biases; w3's result is read outside its block too, so w3 keeps its own
    assert sum(biased) == 3 * model.depth
    for name, arguments in calls:
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        fixed = [tensor for tensor in tensors if tensor.dtype == torch.float32] if autocast else []
        assert all(tensor.stride(-1) == 1 for tensor in tensors)
        assert len({tensor.dtype for tensor in tensors}) == (2 if fixed else 1)
        # float32 beside bfloat16: norm weights, and RoPE's tables
        assert len(fixed) == ({"qknorm_rope": 4, "swiglu": 0}.get(name, 1) if autocast else 0)


def test_copies_and_pickles(build, batch):
    model = build(2)
    inputs = batch(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(*inputs), model(*inputs))
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(twin.parameters(), model.parameters()))


def test_auto_kernels_agree_with_the_reference(build, batch):
    model = build(2)
    chosen = build(2, kernels="auto")
    assert chosen.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(chosen(*batch(model)), model(*batch(model)))


def test_kernels_that_cannot_run_here(build, batch, monkeypatch):
    """A model may be built where its kernels cannot run and moved later; running it there is the error."""

    def unavailable(kind, device):
        raise fastasync_kernels.KernelUnavailable(f"triton needs a CUDA device, not {device}")

    with monkeypatch.context() as patch:
        patch.setattr(fastasync_kernels, "select", unavailable)
        model = build(2, kernels="triton")
        with pytest.raises(UserError, match=r"model\.kernels: triton: triton needs a CUDA device, not cpu"):
            model(*batch(model))
    model.kernels = "reference"
    model.to("cpu")
    assert torch.equal(model(*batch(model)), build(2)(*batch(model)))


def test_repa_without_a_projector(build, batch):
    model = build(2)
    assert not [name for name in model.state_dict() if "repa" in name]
    with pytest.raises(ValueError, match="projector"):
        model(*batch(model), return_repa=True)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"channels": (4,)}, "model.channels: [4]"),
        ({"channels": (4, 0)}, "model.channels: [4, 0]"),
        ({"names": ("texture", "tex")}, "model.names: ['texture', 'tex']"),
        ({"names": ("texture", "a.b")}, "model.names: ['texture', 'a.b']"),
        ({"patch": 3}, "model.patch: 3: must divide the latent grid 4"),
        ({"width": 36}, "model.width: 36: must be a multiple of 4 x heads (here 4 x 2)"),
        ({"repa_width": 8, "repa_depth": 4}, "model.repa_depth: 4: must lie between 1 and the depth 3"),
        ({"kernels": "cuda"}, "model.kernels: cuda: choose one of reference, triton, auto"),
    ],
)
def test_bad_arguments(build, changes, text):
    with pytest.raises(UserError) as caught:
        build(2, **changes)
    assert text in str(caught.value)


def test_sizes_grow():
    counts = [parameter_count(big(size, 1)) for size in SIZES]
    assert all(small < large for small, large in pairwise(counts))
