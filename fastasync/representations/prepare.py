"""From images to a folder that holds everything training needs: latents, statistics, encoder, SemVAE and scorer.

The folder's ``prepared.json`` is its manifest: what it was made from, and the hash of every finished file.  It is
written after each file, so an interrupted ``prepare`` goes on where it stopped.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastasync
from fastasync.data.images import ImageSet, check_images, check_labels
from fastasync.data.latents import LatentSet
from fastasync.errors import UserError, unknown_name
from fastasync.files import PARTIAL, atomic_path, load_tensors, remove_partials, save_tensors, sha256_file, write_json
from fastasync.representations.base import Representation, build, checked_encode, load_plugin
from fastasync.representations.bundle import Bundle, with_statistics
from fastasync.representations.classifier import Classifier, ClassifierSettings, accuracy, train_classifier
from fastasync.representations.statistics import LatentStatistics

MANIFEST, FORMAT = "prepared.json", 1
SCORER_SEED_OFFSET = 1000  # the scorer's seed beside the encoder's
_ENCODE_BATCH = 1000


@dataclass(frozen=True)
class Recipe:
    """How one set is prepared: token grid, classifier, and options of each representation by name."""

    grid: int
    classifier: ClassifierSettings
    options: Mapping[str, Mapping[str, Any]]


RECIPES = {
    "digits": Recipe(4, ClassifierSettings(), {"semantic": {"channels": 8}}),
    # one GPU, 15 epochs for the classifier; its feature map of 256 channels is on the 8x8 grid
    "cifar10": Recipe(
        8,
        ClassifierSettings((64, 128, 256, 512), steps=1465, batch=512, learning_rate=2e-3, shift=4),
        {
            "semantic": {
                "channels": 16,
                "semvae": {"width": 256, "depth": 2, "steps": 2000, "batch": 256, "learning_rate": 1e-3},
            }
        },
    ),
}


def make_recipe(
    dataset: str,
    names: Sequence[str] = ("texture", "semantic"),
    *,
    encoder_steps: int | None = None,
    semvae_steps: int | None = None,
    semantic_channels: int | None = None,
    texture_channels: int | None = None,
    denoiser_steps: int = 0,
) -> Recipe:
    """The set's row of RECIPES for ``names``, with what is given changed.  UserError when the set has no row."""
    if dataset not in RECIPES:
        raise unknown_name("recipe for dataset", dataset, RECIPES)
    row = RECIPES[dataset]
    classifier = row.classifier if encoder_steps is None else replace(row.classifier, steps=encoder_steps)
    options = {name: dict(row.options.get(name, {})) for name in names}
    if "texture" in options and texture_channels is not None:
        options["texture"]["channels"] = texture_channels
    if "texture" in options and denoiser_steps:
        options["texture"]["denoiser"] = {"steps": denoiser_steps}
    if "semantic" in options:
        if semantic_channels is not None:
            options["semantic"]["channels"] = semantic_channels
        if semvae_steps is not None:
            options["semantic"]["semvae"] = {**options["semantic"].get("semvae", {}), "steps": semvae_steps}
    return Recipe(row.grid, classifier, options)


@dataclass(frozen=True)
class Prepared:
    """A prepared folder, read back and checked.

    ``encoder``: the frozen classifier behind the semantic latent (its features may choose a schedule); ``scorer``: the
    one of another seed (its features score a report).  ``info``: the manifest.  ``statistics_fingerprint`` belongs into
    checkpoints.
    """

    latents: LatentSet
    bundle: Bundle
    encoder: Classifier
    scorer: Classifier
    info: dict[str, Any]
    statistics_fingerprint: str


def prepare(
    image_set: ImageSet,
    out_dir: str | Path,
    names: Sequence[str] = ("texture", "semantic"),
    *,
    test_set: ImageSet | None = None,
    recipe: Recipe | None = None,
    plugins: Iterable[str | Path] = (),
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Train encoder, representations and scorer, encode ``image_set`` (mirrored too where its ``mirror`` says so).

    ``names``: the representations in the bundle's order, texture first.  ``recipe``: default, the set's row of RECIPES.
    ``plugins``: Python files that register more representations; they are copied into the folder.  Returns the
    manifest.  Running it again reuses what is finished.  Raises UserError, with nothing overwritten, when the folder
    holds something else, was made from other images, representations or settings, or a finished file is missing or
    altered.
    """
    if recipe is None:
        recipe = make_recipe(image_set.name, names)
    for name in recipe.options:
        if name not in names:
            raise unknown_name("options for representation", name, names)
    if test_set is not None:
        check_images(test_set.images, f"{test_set.name} test set", image_set.image_shape)
        check_labels(test_set.labels, len(test_set), image_set.classes, f"{test_set.name} test set")
    sources = {Path(path).name: Path(path) for path in plugins}
    for path in sources.values():
        load_plugin(path)
    identity = {
        "dataset": image_set.name,
        "images": image_set.fingerprint,
        "test images": test_set.fingerprint if test_set else None,
        "classes": image_set.classes,
        "image shape": list(image_set.image_shape),
        "mirror": image_set.mirror,
        "representations": list(names),
        "options": {name: dict(recipe.options.get(name, {})) for name in names},
        "grid": recipe.grid,
        "classifier": asdict(recipe.classifier),
        "plugins": {file: sha256_file(path) for file, path in sources.items()},
        "seed": seed,
    }
    # first with an untrained encoder: every error in names and options shows before long work
    with torch.random.fork_rng(devices=[]):
        untrained = Classifier(image_set.image_shape, image_set.classes, recipe.classifier.widths, recipe.grid)
    Bundle(_build_all(identity, untrained))
    folder = _Folder.create(Path(out_dir), identity)
    for file, path in sources.items():
        with atomic_path(folder.path / file) as partial:
            partial.write_bytes(path.read_bytes())
    if folder.manifest["complete"]:
        folder.verify()
        return folder.manifest

    def classifier(file: str, classifier_seed: int) -> Classifier:
        def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
            title = Path(file).stem
            model = train_classifier(
                image_set.images, image_set.labels, image_set.classes, recipe.grid, recipe.classifier,
                classifier_seed, image_set.mirror, device, progress, title,
            )  # fmt: skip
            record = {"seed": classifier_seed, "train accuracy": accuracy(model, image_set.images, image_set.labels)}
            if test_set is not None:
                record["test accuracy"] = accuracy(model, test_set.images, test_set.labels)
            return model.state_dict(), record

        return _restore_classifier(folder.part(file, make), identity, device)

    encoder = classifier("encoder.safetensors", seed)
    classifier("scorer.safetensors", seed + SCORER_SEED_OFFSET)
    representations = _build_all(identity, encoder)
    raw: list[Tensor] = []
    for item in representations:
        item.to(device)

        def fit(item: Representation = item) -> tuple[dict[str, Tensor], dict[str, Any]]:
            record: dict[str, Any] = dict(item.fit(image_set.images, seed, progress))
            item.requires_grad_(False).eval()
            return item.state_dict(), record | {"fingerprint": item.fingerprint(), "channels": item.channels}

        item.load_state_dict(folder.part(f"representation-{item.name}.safetensors", fit))

        def encode(item: Representation = item) -> tuple[dict[str, Tensor], dict[str, Any]]:
            views = {"latents": image_set.images}
            if image_set.mirror:
                views["latents_flip"] = image_set.images.flip(-1)
            return {key: _encode_all(item, images, device) for key, images in views.items()}, {}

        raw.append(folder.part(f"latents-{item.name}.safetensors", encode)["latents"])
    folder.part("labels.safetensors", lambda: ({"labels": image_set.labels}, {}))
    bundle = with_statistics(Bundle(representations), _batches(raw))
    assert bundle.statistics is not None
    folder.manifest |= {
        "statistics": asdict(bundle.statistics),
        "statistics_fingerprint": bundle.statistics.fingerprint(),
        "complete": True,
    }
    folder.save()
    return folder.manifest


def load_prepared(directory: str | Path, device: str | torch.device = "cpu") -> Prepared:
    """Read a finished folder onto ``device``; every file's hash and every representation's fingerprint is checked.

    Raises UserError when it is not a prepared folder, is unfinished, or anything is missing, truncated or altered.
    """
    folder = _Folder.open(Path(directory))
    info, remedy = folder.manifest, folder.remedy
    if not info["complete"]:
        raise UserError(str(directory), "unfinished", "run prepare again: it goes on where it stopped")
    identity = info["identity"]
    for file, sha256 in identity["plugins"].items():
        load_plugin(folder.path / file)
        if sha256_file(folder.path / file) != sha256:
            raise UserError(str(folder.path / file), "changed since the latents were made", remedy)
    encoder = _restore_classifier(folder.load("encoder.safetensors"), identity, device)
    scorer = _restore_classifier(folder.load("scorer.safetensors"), identity, device)
    representations = _build_all(identity, encoder)
    views: dict[str, list[Tensor]] = {"latents": [], "latents_flip": []}
    for item in representations:
        item.load_state_dict(folder.load(f"representation-{item.name}.safetensors"))
        tensors = folder.load(f"latents-{item.name}.safetensors")
        for key in tensors:
            views[key].append(tensors[key].to(device))
    values = info["statistics"]
    statistics = LatentStatistics(tuple(values["mean"]), tuple(values["std"]), tuple(values["representations"]))
    bundle = Bundle(representations, statistics).to(device)
    for name, expected, found in zip(bundle.names, statistics.representations, bundle.fingerprints()):
        if expected != found:
            what = f"fingerprint {found[:12]}, the latents were made by {expected[:12]}"
            raise UserError(f"representation {name}", what, "its code changed: prepare into a new folder")
    if statistics.fingerprint() != info["statistics_fingerprint"]:
        raise UserError(str(folder.path / MANIFEST), "statistics were altered", remedy)
    z, flipped = (
        bundle.normalise(bundle.concatenate(views[key])) if views[key] else None for key in ("latents", "latents_flip")
    )
    assert z is not None
    labels = folder.load("labels.safetensors")["labels"].to(device)
    latents = LatentSet(z, labels, identity["classes"], flipped)
    return Prepared(latents, bundle, encoder, scorer, info, info["statistics_fingerprint"])


def _build_all(identity: Mapping[str, Any], encoder: Classifier) -> list[Representation]:
    shape = identity["image shape"]
    return [
        build(name, (shape[0], shape[1], shape[2]), identity["grid"], encoder, **identity["options"][name])
        for name in identity["representations"]
    ]


def _restore_classifier(
    weights: Mapping[str, Tensor], identity: Mapping[str, Any], device: str | torch.device
) -> Classifier:
    shape, widths = identity["image shape"], tuple(identity["classifier"]["widths"])
    with torch.random.fork_rng(devices=[]):  # the random initial weights are not used: keep the caller's state
        model = Classifier((shape[0], shape[1], shape[2]), identity["classes"], widths, identity["grid"])
    model.load_state_dict(weights)
    return model.to(device).requires_grad_(False).eval()


@torch.no_grad()
def _encode_all(item: Representation, images: Tensor, device: str | torch.device) -> Tensor:
    return torch.cat([checked_encode(item, part.to(device)).cpu() for part in images.split(_ENCODE_BATCH)])


def _batches(raw: Sequence[Tensor]) -> Iterator[Tensor]:
    for parts in zip(*(latents.split(_ENCODE_BATCH) for latents in raw)):
        yield torch.cat(parts, dim=1)


class _Folder:
    """The folder, its manifest and its finished files."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path, self.manifest = path, manifest
        self.remedy = f"restore it, or delete the folder {path} and prepare again"

    @classmethod
    def open(cls, path: Path) -> _Folder:
        """An existing prepared folder.  UserError when it is none."""
        file = path / MANIFEST
        if not file.is_file():
            raise UserError(str(path), f"no {MANIFEST} in it", "not a prepared folder: run prepare first")
        try:
            manifest = json.loads(file.read_text())
            if manifest["format"] != FORMAT:
                raise UserError(str(file), f"format {manifest['format']}", f"this version reads format {FORMAT}")
            manifest["identity"], manifest["parts"], manifest["complete"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                str(file), "not a readable manifest", f"delete the folder {path} and prepare again"
            ) from None
        return cls(path, manifest)

    @classmethod
    def create(cls, path: Path, identity: dict[str, Any]) -> _Folder:
        """Start, or continue what was made from the same ``identity``; UserError when it holds anything else."""
        identity = json.loads(json.dumps(identity))  # as it reads back: lists for tuples
        if path.exists() and not path.is_dir():
            raise UserError(str(path), "not a folder", "choose another --out")
        if (path / MANIFEST).is_file():
            folder = cls.open(path)
            found = folder.manifest["identity"]
            for key, value in identity.items():
                if found.get(key) != value:
                    what = f"prepared with {key} {_short(found.get(key))}, asked for {_short(value)}"
                    raise UserError(str(path), what, "choose another folder, or delete this one")
            remove_partials(path)
            return folder
        if path.is_dir() and any(not entry.name.endswith(PARTIAL) for entry in path.iterdir()):
            raise UserError(str(path), f"not empty and without {MANIFEST}", "choose an empty or a new folder")
        versions = {
            "fastasync": fastasync.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        }
        manifest = {"format": FORMAT, "complete": False, "versions": versions, "identity": identity, "parts": {}}
        folder = cls(path, manifest)
        folder.save()
        remove_partials(path)
        return folder

    def save(self) -> None:
        write_json(self.path / MANIFEST, self.manifest)

    def load(self, file: str) -> dict[str, Tensor]:
        """A finished file's tensors, on the CPU; its hash is checked."""
        return load_tensors(self.path / file, self.manifest["parts"][file]["sha256"], self.remedy)

    def part(self, file: str, make: Callable[[], tuple[Mapping[str, Tensor], dict[str, Any]]]) -> dict[str, Tensor]:
        """The tensors of ``file``: read when finished, else made by ``make() -> (tensors, record)`` and written."""
        if file not in self.manifest["parts"]:
            tensors, record = make()
            self.manifest["parts"][file] = {"sha256": save_tensors(self.path / file, tensors), **record}
            self.save()
            return dict(tensors)
        return self.load(file)

    def verify(self) -> None:
        for file in self.manifest["parts"]:
            self.load(file)


def _short(value: object) -> str:
    text = value[:12] if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
