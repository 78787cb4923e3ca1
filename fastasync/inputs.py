"""What a run works on: normalised latents, how samples become images, and what selects and scores them.

Two members: images that ``prepare`` encodes (digits, CIFAR-10), and a folder of latents that exists already.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastasync.config import Config
from fastasync.data import ImageSet, Latents, load_images
from fastasync.data.shard_loader import MappedLatents, open_latents
from fastasync.errors import UserError, unknown_name
from fastasync.evaluation import (
    ClassifierFeatures,
    FeatureExtractor,
    FeatureSet,
    GaussianStatistics,
    InceptionFeatures,
    load_npz,
)
from fastasync.files import load_tensors, save_tensors, sha256_file, write_json
from fastasync.probe import REFERENCE_SAMPLES, Scorer, Selection
from fastasync.representations import build
from fastasync.representations.base import ImageShape, Representation, load_plugin, registered
from fastasync.representations.bundle import only_decoder
from fastasync.representations.classifier import Classifier
from fastasync.representations.prepare import MANIFEST, Prepared, Recipe, load_prepared, make_recipe, prepare
from fastasync.run import Run

Say = Callable[[str], None]


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: features or statistics of a reference set, its name and fingerprint."""

    features: FeatureSet | GaussianStatistics
    name: str
    fingerprint: str


@dataclass(frozen=True)
class Inputs:
    """See the module.  ``decode``: normalised latents -> uint8 images [N, C, H, W]; ``scorer``: what C selects with."""

    latents: Latents
    statistics_fingerprint: str
    decode: Callable[[Tensor], Tensor]
    decoder: str
    grey: bool
    scorer: Callable[[], Scorer | None]
    extractor: Callable[[], FeatureExtractor]
    reference: Callable[[FeatureExtractor], Reference]


def open_inputs(run: Run, device: torch.device, say: Say = print) -> Inputs:
    """The run's inputs; images are prepared first unless they are already.  Raises UserError."""
    if run.config.data.dataset == "latents":
        return _from_latents(run.config, device)
    return _from_images(run, device, say)


def check_inputs(config: Config, latents: MappedLatents | None = None) -> Selection:
    """What can be said about the data before any work; returns what C's scoring costs.

    ``latents``: the configuration's folder, where it is open already.
    Raises UserError: missing or damaged data, a batch larger than the set, other classes, unknown representations.
    """
    reps = config.representations
    if config.data.dataset == "latents":
        latents = latents or open_latents(
            config.data.root, features=config.objective.cached_features, classes=config.model.classes
        )
        count, classes, where, mirrored = len(latents), latents.classes, config.data.root, latents.mirrored
        reordered = latents.names != reps.names and sorted(latents.names) == sorted(reps.names)
        if reordered or latents.channels != reps.channels:  # other names for the same parts are the user's choice
            present = ", ".join(f"{name} ({width})" for name, width in zip(latents.names, latents.channels))
            asked = ", ".join(f"{name} ({width})" for name, width in zip(reps.names, reps.channels))
            raise UserError("representations.names and channels", asked, f"{where} has {present}, in this order")
        if "learned" in (config.schedule.name, *config.schedule.others) and config.probe.estimator == "C":
            raise UserError(
                "probe.estimator", "C", "a folder of latents has no encoder to select with: use D (or A, B)"
            )
    else:
        images = load_images(config.data.dataset, config.data.root, "train")
        load_images(config.data.dataset, config.data.root, config.evaluate.split)
        count, classes, where, mirrored = len(images), images.classes, config.data.dataset, images.mirror
    if config.train.batch > count:
        raise UserError("train.batch", config.train.batch, f"must be at most the {count} images of the set")
    if config.model.classes != classes:
        raise UserError("model.classes", config.model.classes, f"{where} has {classes}")
    if config.data.flip and not mirrored:
        raise UserError("data.flip", "true", f"{where} has no mirrored images: set data.flip=false")
    if config.data.dataset == "latents":
        return Selection()
    if reps.plugin:
        load_plugin(reps.plugin)
    for name in reps.names:
        if name not in registered():
            raise unknown_name("representations.names", name, registered())
    recipe = _recipe(config, images.image_shape)
    with torch.device("meta"):
        encoder = Classifier(images.image_shape, images.classes, recipe.classifier.widths, recipe.grid)
    parts = [
        build(name, images.image_shape, reps.grid, encoder=encoder, **recipe.options.get(name, {}))
        for name in reps.names
    ]
    if (found := tuple(part.channels for part in parts)) != reps.channels:
        wanted = f"the encoders give {','.join(map(str, found))} on representations.grid={reps.grid}"
        raise UserError("representations.channels", ",".join(map(str, reps.channels)), wanted)
    flops = _selection_flops(encoder, only_decoder(parts))
    return Selection(flops, min(count, REFERENCE_SAMPLES) * flops)


def check_outputs(config: Config, stages: Sequence[str]) -> None:
    """What sampling and scoring of latents need, before any work.  Raises UserError."""
    decoder, settings = config.representations.decoder, config.evaluate
    if config.representations.plugin:  # which may be the decoder
        load_plugin(config.representations.plugin)
    if "sample" in stages:
        if not decoder:
            raise UserError("representations.decoder", "(empty)", "give the texture autoencoder's weights file")
        if decoder not in registered() and not Path(decoder).exists():
            remedy = f"is no file and no representation ({', '.join(sorted(registered()))})"
            raise UserError("representations.decoder", decoder, remedy)
    if "evaluate" in stages:
        if settings.features != "inception":
            raise UserError("evaluate.features", settings.features, "a folder of latents is scored with inception")
        if not settings.reference:
            raise UserError("evaluate.reference", "(empty)", "give an npz with mu and sigma, or with arr_0 (images)")
        if not Path(settings.reference).is_file():
            raise UserError("evaluate.reference", settings.reference, "no such file")


def check_decoder(config: Config, latents: MappedLatents) -> None:
    """UserError unless the decoder is of the encoder that made the latents, where that is known."""
    _latent_decoder(config, latents, torch.device("cpu"))()


# --- images ------------------------------------------------------------------------------------------------------


def _recipe(config: Config, image_shape: ImageShape) -> Recipe:
    """The data set's recipe with what the configuration changes of it."""
    reps = config.representations
    channels = dict(zip(reps.names, reps.channels))
    pixels = image_shape[0] * (image_shape[1] // reps.grid) ** 2  # of a patch
    texture = channels.get("texture", pixels)
    recipe = make_recipe(
        config.data.dataset,
        reps.names,
        encoder_steps=reps.encoder_steps or None,
        semvae_steps=reps.semvae_steps or None,
        semantic_channels=channels.get("semantic"),
        texture_channels=texture if texture < pixels else None,  # their principal components
        denoiser_steps=reps.denoiser_steps,
    )
    return replace(recipe, grid=reps.grid)


def _from_images(run: Run, device: torch.device, say: Say) -> Inputs:
    config, reps = run.config, run.config.representations
    train = load_images(config.data.dataset, config.data.root, "train")
    test = load_images(config.data.dataset, config.data.root, "test")
    if (run.prepared / "prepared.json").exists():
        say(f"prepare: done, {run.prepared}")
    else:
        say(f"prepare: encoding {config.data.dataset} into {run.prepared}")
    prepare(
        train,
        run.prepared,
        reps.names,
        test_set=test,
        recipe=_recipe(config, train.image_shape),
        plugins=[reps.plugin] if reps.plugin else [],
        seed=config.data.seed,
        device=device,
    )
    prepared = load_prepared(run.prepared, device)

    def extractor() -> FeatureExtractor:
        if config.evaluate.features == "inception":
            return InceptionFeatures(config.evaluate.weights, device)
        return ClassifierFeatures(prepared.scorer, f"{config.data.dataset}-classifier", device, has_logits=True)

    def reference(extractor: FeatureExtractor) -> Reference:
        images = {"train": train, "test": test}[config.evaluate.split]
        features = _reference_features(run.prepared, config.evaluate.split, images, extractor, say)
        return Reference(features, f"{config.data.dataset}-{config.evaluate.split}", images.fingerprint)

    return Inputs(
        latents=prepared.latents,
        statistics_fingerprint=prepared.statistics_fingerprint,
        decode=prepared.bundle.decode,
        decoder=prepared.bundle.decoder.name,
        grey=train.image_shape[0] == 1,
        scorer=lambda: _scorer(prepared),
        extractor=extractor,
        reference=reference,
    )


def _scorer(prepared: Prepared) -> Scorer:
    """What may select a schedule: the frozen encoder's features of the decoded samples, never the report's scorer's."""
    extractor = ClassifierFeatures(prepared.encoder, "encoder", prepared.latents.device)

    def features(z: Tensor) -> Tensor:
        return extractor(prepared.bundle.decode(z))

    return Scorer.of(features, prepared.latents, flops=_selection_flops(prepared.encoder, prepared.bundle.decoder))


def _selection_flops(encoder: Classifier, decoder: Representation) -> int:
    """FLOPs of one image from its latents and of its features, so that selecting counts against the budget too."""
    state = [*decoder.parameters(), *decoder.buffers()]
    latents = torch.zeros(1, decoder.channels, decoder.grid, decoder.grid, device=state[0].device if state else "cpu")
    images = torch.zeros(1, *decoder.image_shape, device=next(encoder.parameters()).device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder.decode(latents)
        encoder.features(images)
    return counter.get_total_flops()


def _reference_features(
    folder: Path, split: str, images: ImageSet, extractor: FeatureExtractor, say: Say
) -> FeatureSet:
    """Features of the reference images, computed once and kept beside the prepared latents."""
    key = hashlib.sha256(f"{extractor.fingerprint} {images.fingerprint}".encode()).hexdigest()[:12]
    file = folder / f"reference-{split}-{key}.safetensors"
    record = file.with_suffix(".json")
    if record.exists():
        remedy = f"remove it and {record.name}, and evaluate again"
        try:
            sha256 = json.loads(record.read_text())["sha256"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(str(record), f"cannot be read ({error})", "remove it and evaluate again") from None
        features = load_tensors(file, sha256, remedy)["features"]
    else:
        say(f"evaluate: features of the {len(images)} reference images ({extractor.name})")
        features = extractor.extract(images.images).features
        write_json(record, {"sha256": save_tensors(file, {"features": features})})
    return FeatureSet(features, extractor.fingerprint)


# --- a folder of latents -----------------------------------------------------------------------------------------


def _from_latents(config: Config, device: torch.device) -> Inputs:
    reps, settings = config.representations, config.evaluate
    latents = open_latents(
        config.data.root, device, features=config.objective.cached_features, classes=config.model.classes
    )
    mean = torch.tensor(latents.statistics.mean, device=device).float()[: reps.channels[0], None, None]
    std = torch.tensor(latents.statistics.std, device=device).float()[: reps.channels[0], None, None]
    decoder = _latent_decoder(config, latents, device)

    def decode(z: Tensor) -> Tensor:
        return decoder().decode(z[:, : reps.channels[0]] * std + mean)

    def extractor() -> FeatureExtractor:
        return InceptionFeatures(settings.weights, device)

    def reference(extractor: FeatureExtractor) -> Reference:
        path = Path(settings.reference)
        try:
            found: FeatureSet | GaussianStatistics = GaussianStatistics.load(path)
        except UserError:  # not statistics: images, or nothing, which load_npz names
            found = extractor.extract(load_npz(path))
        return Reference(found, path.name, sha256_file(path))

    return Inputs(
        latents=latents,
        statistics_fingerprint=latents.statistics_fingerprint,
        decode=decode,
        decoder=Path(reps.decoder).name,
        grey=False,
        scorer=lambda: None,
        extractor=extractor,
        reference=reference,
    )


def _latent_decoder(config: Config, latents: Latents, device: torch.device) -> Callable[[], Representation]:
    """What decodes the first representation, made when it is first needed.

    ``representations.decoder`` is the autoencoder's weights file, the name of a representation that needs none, or a
    prepared folder.
    """
    reps = config.representations
    index = getattr(latents, "index", None)  # an SFD folder has none: its encoders are not known
    shape = (3, 16 * reps.grid, 16 * reps.grid) if index is None else tuple(index.encoding.image_shape)

    @cache
    def decoder() -> Representation:
        if reps.decoder in registered():
            made = build(reps.decoder, shape, reps.grid)
        elif (Path(reps.decoder) / MANIFEST).is_file():
            made = load_prepared(reps.decoder).bundle.decoder
        else:
            made = build("autoencoder", shape, reps.grid, weights=reps.decoder)
        if index is not None and not made.fits(index.encoding.fingerprints[0]):
            found, wanted = made.fingerprint()[:12], index.encoding.fingerprints[0][:12]
            raise UserError("representations.decoder", reps.decoder, f"is {found}, the latents were made by {wanted}")
        return made.to(device)

    return decoder
