"""Out of memory is one line that names what fits and the field to change, and what it says works."""

import re

import pytest
import torch

from fastasync.config import Sample, apply_settings
from fastasync.errors import UserError
from fastasync.model import UNDIVIDED, LightningDiT, Zero, activation_memory, memory_estimate, parameter_count
from fastasync.presets import preset
from fastasync.training import PlainEngine, build_model
from fastasync.training.build import USABLE
from fastasync.training.out_of_memory import explained_sampling, training_error

GPU, GIB = torch.device("cuda"), 2**30


def advice(gib, *settings, recompute="none", zero=UNDIVIDED):
    """What is said to a run of XL on devices of so many GiB."""
    config = apply_settings(preset("imagenet256-xl"), settings)
    error = training_error(config, int(gib * GIB), GPU, recompute, zero)
    assert (error.field, error.value, error.exit_code) == ("train.batch", config.train.batch, 2)
    return error.remedy


def number(pattern, text):
    return int(re.search(pattern, text).group(1))


def xl():
    with torch.device("meta"):
        return build_model(preset("imagenet256-xl"))


@pytest.mark.parametrize("gib", [24, 40, 80])
def test_the_estimate_says_what_fits(gib):
    said = advice(gib)
    assert said.startswith(f"out of memory: 256 images at a time do not fit into the {gib} GiB that a device has")
    fits = number(r"about (\d+) do", said)

    def needs(images):
        return memory_estimate(xl(), images).total

    assert needs(fits) <= gib * GIB
    assert needs(fits) > 0.85 * gib * GIB
    parts = number(r"train.accumulate=(\d+) \(", said)
    assert 256 % parts == 0
    assert 256 // parts <= fits < 256 // (parts // 2)  # the smallest split that fits
    assert f"train.batch={fits} (another run" in said
    assert number(r"parts of (\d+), same results", said) == 256 // parts
    enough = re.search(r"train.memory=(\w+) \(about (\d+) fit", said)
    assert (enough is None) == (gib == 24)  # there not even full recomputation has room for 256
    if enough is not None:
        assert memory_estimate(xl(), 256, "bf16", enough[1]).total <= gib * GIB
        assert int(enough[2]) >= 256


def test_a_failure_knows_better_than_the_estimate():
    """The estimate has room for 256 images in 139 GiB, and yet they did not fit: fewer do."""
    said = advice(139)
    assert number(r"about (\d+) do", said) == int(USABLE * 256)
    assert "set train.accumulate=2 (parts of 128" in said


def test_ranks_and_parts_count():
    said = advice(24, "train.batch=384", "train.accumulate=2", zero=Zero(1, 2))
    assert "96 images at a time" in said
    fits, parts = number(r"about (\d+) do", said), number(r"train.accumulate=(\d+)", said)
    assert (384 % (2 * parts), parts % 2) == (0, 0)
    assert 384 // (2 * parts) <= fits < 384 // (2 * (parts // 2))
    assert f"train.batch={fits * 4} (" in said
    sharded = number(r"about (\d+) do", advice(24, "train.batch=384", "train.accumulate=2", zero=Zero(3, 2)))
    assert sharded > fits


@pytest.mark.parametrize("stage", [1, 2])
def test_what_fits_beside_working_weights(stage):
    """On two devices of 40 GiB: their bf16 weights and gradients, and half of what is float32."""
    zero = Zero(stage, 2, working=True)
    fits = number(r"about (\d+) do", advice(40, "train.batch=512", zero=zero))
    count = parameter_count(xl())
    held = [(2 + 2 + 16 / 2) * count, (2 + (4 + 16) / 2) * count][stage - 1]
    room = 40 * GIB - held
    assert fits == int(USABLE * room / activation_memory(xl(), 1))
    assert fits > number(r"about (\d+) do", advice(40, "train.batch=512", zero=Zero(stage, 2)))


def test_recomputation_comes_where_one_image_is_too_much():
    model = xl()
    fixed, one = memory_estimate(model, 0).total, activation_memory(model, 1)
    gib = (fixed + one) / GIB  # with a tenth left free there is no room
    assert activation_memory(model, 1, "bf16", "selective") < USABLE * one
    said = advice(gib)
    assert "with train.memory=selective about 1 do: " in said
    assert said.endswith("set train.memory=selective and train.accumulate=256 (same results, slower)")
    said = advice((fixed + 20 * one) / GIB, "train.batch=1")  # it fits by the estimate
    assert "with train.memory=selective about 1 do: set train.memory=selective (same" in said
    assert "train.memory" not in advice(40, recompute="full")


def test_a_network_too_large_for_the_device():
    said = advice(8)
    assert "weights, gradients and optimizer take about 14: choose a smaller model.size, or more GPUs with" in said
    assert said.endswith("train.zero=3")
    assert advice(3, zero=Zero(3, 4)).endswith("or more GPUs")


def few_at_a_time(monkeypatch, most, usable):
    """A device whose forward pass runs out of memory above ``most`` images, and what CUDA says about it."""
    forward = LightningDiT.forward

    def limited(self, x, *rest, **options):
        if len(x) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, x, *rest, **options)

    monkeypatch.setattr(LightningDiT, "forward", limited)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (usable // 3, 2 * usable))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: usable - usable // 3)


def test_what_training_says_works(tmp_path, tiny, run, monkeypatch):
    model = build_model(tiny())
    usable = memory_estimate(model, 0, "fp32").total + int(3.5 / USABLE * activation_memory(model, 1, "fp32"))
    few_at_a_time(monkeypatch, 3, usable)
    with pytest.raises(UserError) as caught:
        run(tiny(), tmp_path)
    said = str(caught.value)
    assert said.startswith("train.batch: 8: out of memory: 8 images at a time do not fit")
    assert "about 3 do: set train.accumulate=4 (parts of 2, same results)" in said
    assert "\n" not in said
    assert run(tiny(train=dict(accumulate=4)), tmp_path).step == 6  # in the same folder


def test_running_out_later_keeps_what_is_saved(tmp_path, tiny, run, monkeypatch):
    calls, step = [], PlainEngine.run

    def fails_at_six(self, *arguments):
        calls.append(arguments)
        if len(calls) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, *arguments)

    few_at_a_time(monkeypatch, 100, 2**30)
    monkeypatch.setattr(PlainEngine, "run", fails_at_six)
    with pytest.raises(UserError, match=r"set train.accumulate=2 \(parts of 4"):
        run(tiny(), tmp_path)
    assert run(tiny(train=dict(accumulate=2)), tmp_path).resumed_from == 4


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(batch=500), r"sample.batch: 500: out of memory .* 3 GiB .*try sample.batch=250 \(the images stay"),
        (dict(batch=1), r"sample.batch: 1: .*more memory"),
        (dict(integrator="dopri5"), r"sample.integrator: dopri5: .*64 images together: use heun"),
    ],
)
def test_sampling(monkeypatch, settings, says):
    few_at_a_time(monkeypatch, 0, 3 * GIB)
    with pytest.raises(UserError, match=says), explained_sampling(Sample(**settings), torch.device("cpu")):
        raise torch.OutOfMemoryError("CUDA out of memory")
