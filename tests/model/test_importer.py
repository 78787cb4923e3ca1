"""Published checkpoints in, ours out, and one clear line for everything that is not one."""

import itertools
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastasync.errors import UserError
from fastasync.model import LightningDiT, export_state, load_into, load_state
from fastasync.model.importer import strip_wrappers

WIDTH, DEPTH, HEADS, GRID = 24, 2, 2, 4


def published_layout(times: dict[str, int], channels: int, repa: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes that SFD (two time embeddings) and LightningDiT (one) write, for a model of this file's size."""
    hidden, head, tokens = 64, WIDTH // HEADS, GRID * GRID

    def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, tokens, WIDTH)}
    shapes |= {"x_embedder.proj.weight": (WIDTH, channels, 1, 1), "x_embedder.proj.bias": (WIDTH,)}
    for name, width in times.items():
        shapes |= linear(f"{name}.mlp.0", 256, width) | linear(f"{name}.mlp.2", width, width)
    shapes |= {"y_embedder.embedding_table.weight": (6, WIDTH)}
    shapes |= {"feat_rope.freqs_cos": (tokens, head), "feat_rope.freqs_sin": (tokens, head)}
    for index in range(DEPTH):
        block = f"blocks.{index}"
        shapes |= {f"{block}.norm1.weight": (WIDTH,), f"{block}.norm2.weight": (WIDTH,)}
        shapes |= linear(f"{block}.attn.qkv", WIDTH, 3 * WIDTH) | linear(f"{block}.attn.proj", WIDTH, WIDTH)
        shapes |= {f"{block}.attn.q_norm.weight": (head,), f"{block}.attn.k_norm.weight": (head,)}
        shapes |= linear(f"{block}.mlp.w12", WIDTH, 2 * hidden) | linear(f"{block}.mlp.w3", hidden, WIDTH)
        shapes |= linear(f"{block}.adaLN_modulation.1", WIDTH, 6 * WIDTH)
    shapes |= {"final_layer.norm_final.weight": (WIDTH,)} | linear("final_layer.linear", WIDTH, channels)
    shapes |= linear("final_layer.adaLN_modulation.1", WIDTH, 2 * WIDTH)
    if repa:
        for index, (inputs, outputs) in {0: (WIDTH, 2048), 2: (2048, 2048), 4: (2048, 768)}.items():
            shapes |= linear(f"repa_projector.{index}", inputs, outputs)
    return shapes


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def sfd_model(repa_width: int | None = 768, **changes: object) -> LightningDiT:
    arguments = {"channels": (4, 2), "names": ("texture", "semantic"), "grid": GRID, "classes": 5}
    arguments |= {"depth": DEPTH, "width": WIDTH, "heads": HEADS, "repa_width": repa_width}
    return LightningDiT(**(arguments | changes))  # type: ignore[arg-type]


SFD = published_layout({"t_embedder_sem": WIDTH // 2, "t_embedder_tex": WIDTH // 2}, 6, repa=True)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state(SFD)


def holds(model: LightningDiT, state: dict[str, Tensor]) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in state)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."])
def test_sfd_checkpoint(tmp_path, state, prefix):
    ema = {prefix + name: value for name, value in state.items()}
    raw = {prefix + name: value + 1 for name, value in state.items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]}
    path = tmp_path / "0080000.pt"
    torch.save({"model": raw, "ema": ema, "opt": optimizer, "config": {"model": {"use_qknorm": True}}}, path)
    model = sfd_model()
    load_into(model, load_state(path))
    assert holds(model, state)
    load_into(model, load_state(path, prefer="model"))
    assert holds(model, {name: value + 1 for name, value in state.items()})


def test_lwd_checkpoint_and_regional_compile_names(tmp_path, state):
    path = tmp_path / "lwd.pt"
    names = {
        name: name.replace("blocks.0.", "blocks.0._orig_mod.").replace("attn.qkv", "attn._orig_mod.qkv")
        for name in state
    }
    torch.save({"ema": {names[name]: value for name, value in state.items()}}, path)
    model = sfd_model()
    load_into(model, load_state(path))
    assert holds(model, state)


def test_lightningdit_checkpoint_with_one_time_embedding(tmp_path):
    state = random_state(published_layout({"t_embedder": WIDTH}, 4, repa=False))
    path = tmp_path / "lightningdit.pt"
    torch.save({"model": state, "ema": state, "opt": {}, "config": {}}, path)
    model = sfd_model(None, channels=(4,), names=("texture",))
    load_into(model, load_state(path))
    assert holds(model, state)


def test_bare_dicts_safetensors_and_half_precision(tmp_path, state):
    save_file(state, tmp_path / "weights.safetensors")
    torch.save(state, tmp_path / "weights.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for source in (tmp_path / "weights.safetensors", str(tmp_path / "weights.pt"), tmp_path / "old.pt", state):
        model = sfd_model()
        load_into(model, load_state(source))
        assert holds(model, state)
    load_into(model, {name: value.bfloat16() for name, value in state.items()})
    assert holds(model, {name: value.bfloat16().float() for name, value in state.items()})


def test_the_weights_loaded_are_not_tied_to_the_file(tmp_path, state):
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    model = sfd_model()
    load_into(model, load_state(path))
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.add_(1)
    assert torch.equal(load_state(path)["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])


def test_raw_weights_for_want_of_averaged_ones_are_announced(state):
    with pytest.warns(UserWarning, match="no 'ema' weights, using 'model'"):
        assert load_state({"model": state}).keys() == state.keys()


def test_export_round_trip(tmp_path, state):
    model = sfd_model()
    load_into(model, state)
    path = tmp_path / "export.pt"
    torch.save(export_state(model), path)
    assert list(torch.load(path, weights_only=True)) == ["ema"]
    other = sfd_model()
    load_into(other, load_state(path))
    assert holds(other, state)
    compiled = torch.compile(model, backend="eager")
    assert export_state(compiled)["ema"].keys() == state.keys()
    load_into(compiled, {name: 2 * value for name, value in state.items()})
    assert holds(model, {name: 2 * value for name, value in state.items()})


def test_every_nesting_is_stripped():
    for count in range(4):
        for parts in itertools.product(["module", "_orig_mod"], repeat=count):
            assert strip_wrappers(".".join([*parts, "blocks.0.norm1.weight"])) == "blocks.0.norm1.weight"
    assert strip_wrappers("modules.0.weight") == "modules.0.weight"


def test_another_architecture_names_what_differs(state):
    model = sfd_model(None, depth=3, channels=(5, 2))
    before = export_state(model)["ema"]
    with pytest.raises(UserError) as caught:
        load_into(model, state, source="xl.pt")
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("xl.pt: weights of another architecture: missing: blocks.2.")
    assert "unexpected: repa_projector.0.weight" in text
    assert "(and 3 more)" in text  # six entries of the projector, three named
    assert "x_embedder.proj.weight (24, 6, 1, 1) in the file, (24, 7, 1, 1) in the model" in text
    assert holds(model, before)


def test_one_time_embedding_does_not_fit_two(state):
    with pytest.raises(UserError, match=r"missing: t_embedder\.mlp\.0\.weight.*unexpected: t_embedder_"):
        load_into(sfd_model(channels=(6,), names=("texture",)), state)


def test_files_that_are_not_checkpoints(tmp_path, state):
    torch.save({"ema": state}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    save_file(state, tmp_path / "whole.safetensors")
    files = {
        "empty.pt": b"",
        "text.pt": b"not a checkpoint",
        "pickle.pt": pickle.dumps({"ema": object}, protocol=2),
        "html.safetensors": b"<html>404</html>",
        "cut.safetensors": (tmp_path / "whole.safetensors").read_bytes()[:-100],
    }
    files |= {f"cut{share}.pt": whole[: len(whole) * share // 10] for share in range(1, 10)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="truncated, or not a checkpoint") as caught:
            load_state(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_contents_that_are_not_weights(tmp_path, state):
    torch.save([1, 2], tmp_path / "list.pt")
    cases = {
        "holds a list": tmp_path / "list.pt",
        "no such file": tmp_path / "absent.pt",
        "no weights": {},
        "entry 'epoch' is a int": {"epoch": 3},
        "two entries for 'a'": {"a": torch.ones(1), "module.a": torch.ones(1)},
    }
    for text, source in cases.items():
        with pytest.raises(UserError, match=text):
            load_state(source)
    with pytest.raises(UserError, match="choose one of ema, model"):
        load_state(state, prefer="opt")


class Forbidden:
    """Unpickling this would run code: weights_only must refuse it."""

    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("code in a checkpoint ran",))


def test_code_in_a_checkpoint_does_not_run(tmp_path, state, capsys):
    torch.save({"ema": state, "config": Forbidden()}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="not a checkpoint of tensors only"):
        load_state(tmp_path / "bad.pt")
    assert "ran" not in capsys.readouterr().out
