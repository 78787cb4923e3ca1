from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from fastasync.model import LightningDiT

BUNDLES = {
    1: ((4,), ("texture",)),
    2: ((4, 2), ("texture", "semantic")),
    3: ((4, 3, 2), ("texture", "lowfreq", "semantic")),
}


def build(count: int = 2, **changes: Any) -> LightningDiT:
    """A small model with ``count`` representations and, unless ``zero``, weights that make every part matter."""
    zero = changes.pop("zero", False)
    channels, names = BUNDLES[count]
    defaults: dict[str, Any] = {"grid": 4, "classes": 5, "depth": 3, "width": 32, "heads": 2}
    torch.manual_seed(0)
    model = LightningDiT(**({"channels": channels, "names": names} | defaults | changes))
    if not zero:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = 0.2 * torch.randn(parameter.shape)
                parameter.copy_(1 + noise if "norm" in name else noise)
    return model


def batch(model: LightningDiT, size: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, tau and y of a model, in its precision."""
    generator = torch.Generator().manual_seed(1)
    dtype = model.pos_embed.dtype
    x = torch.randn(size, sum(model.channels), model.grid, model.grid, generator=generator).to(dtype)
    tau = torch.rand(size, len(model.channels), generator=generator).to(dtype)
    return x, tau, torch.randint(model.classes + 1, (size,), generator=generator)


def compile_parts(model: LightningDiT, what: str) -> None:
    """The whole ``model``, its ``blocks``, or nothing; a graph break raises."""
    for part in {"model": [model], "blocks": model.blocks}.get(what, []):
        part.compile(backend="aot_eager", fullgraph=True)


@pytest.fixture(name="build")
def build_fixture() -> Callable[..., LightningDiT]:
    return build


@pytest.fixture(name="batch")
def batch_fixture() -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    return batch


@pytest.fixture(name="compile_parts")
def compile_parts_fixture() -> Callable[[LightningDiT, str], None]:
    return compile_parts


def kept_bytes(model: LightningDiT, inputs: Sequence[torch.Tensor], dtype: torch.dtype | None = None) -> int:
    """Bytes that autograd keeps for the backward pass under autocast to ``dtype``, each storage once, no parameters."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    half = torch.autocast(inputs[0].device.type, dtype, enabled=dtype is not None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), half:
        out = model(*inputs)
    del out
    return sum(kept.values())


@pytest.fixture(name="kept_bytes")
def kept_bytes_fixture() -> Callable[..., int]:
    return kept_bytes
