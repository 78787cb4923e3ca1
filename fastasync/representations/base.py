"""What a representation is, and the registry through which a user adds one."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fastasync.errors import UserError, unknown_name
from fastasync.files import digest_tensors, sha256_file

ImageShape = tuple[int, int, int]  # (C, H, W)


class Representation(nn.Module):
    """One view of an image on the token grid.  A subclass sets ``channels`` and implements ``encode``.

    The constructor takes ``(image_shape, grid, **options)``, where the options are JSON values; with ``uses_encoder``
    also ``encoder``, the run's frozen classifier.  What ``fit`` learns belongs into parameters or buffers: they are
    saved, restored and hashed.
    """

    name: ClassVar[str]  # set by @register
    version: ClassVar[int] = 1  # raise it when ``encode`` changes: latents of the old code are then refused
    source: ClassVar[str] = ""  # hash of the plugin file, set by load_plugin
    uses_encoder: ClassVar[bool] = False
    channels: int
    options: dict[str, Any]  # set by build

    def __init__(self, image_shape: ImageShape, grid: int):
        super().__init__()
        self.image_shape, self.grid = image_shape, grid

    @property
    def decodes(self) -> bool:
        """Whether images can be made from this representation."""
        return type(self).decode is not Representation.decode

    @property
    def learns(self) -> bool:
        """Whether ``fit`` must see the training images before anything is encoded."""
        return type(self).fit is not Representation.fit

    def encode(self, images: Tensor) -> Tensor:
        """Images uint8 [N, C, H, W] -> raw latents float32 [N, channels, grid, grid], on the images' device."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Raw latents float32 [N, channels, grid, grid] -> images uint8 [N, C, H, W]; one of a bundle has it."""
        raise NotImplementedError

    def fit(self, images: Tensor, seed: int, progress: bool = True) -> dict[str, float]:
        """Learn from the training images (uint8, CPU) on the module's device; returns figures to record."""
        return {}

    def fingerprint(self) -> str:
        """SHA-256 of what defines the encoding: class, version, plugin file, image shape, grid, options and weights."""
        kind = type(self)
        facts = [
            self.name,
            kind.__qualname__,
            kind.version,
            kind.source,
            list(self.image_shape),
            self.grid,
            self.options,
        ]
        return digest_tensors(self.state_dict(), *facts)

    def fits(self, fingerprint: str) -> bool:
        """Whether this decodes latents whose encoding has that fingerprint."""
        return self.fingerprint() == fingerprint


Kind = TypeVar("Kind", bound=type[Representation])
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}  # of options, by default
_REGISTRY: dict[str, type[Representation]] = {}


def register(name: str) -> Callable[[Kind], Kind]:
    """Class decorator: make a Representation known as ``name``.  A name that another file has taken is a UserError."""

    def add(kind: Kind) -> Kind:
        known = _REGISTRY.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
            raise UserError(
                "representation", repr(name), f"already registered by {known.__module__}: choose another name"
            )
        kind.name = name
        _REGISTRY[name] = kind
        return kind

    return add


def registered() -> tuple[str, ...]:
    """The names that ``build`` accepts."""
    return tuple(_REGISTRY)


def build(
    name: str, image_shape: ImageShape, grid: int, encoder: nn.Module | None = None, **options: Any
) -> Representation:
    """A representation of images (C, H, W) on a grid x grid of tokens.

    UserError: an unknown name or option, a size below 1, or a classifier that is needed and not given.
    """
    if name not in _REGISTRY:
        raise unknown_name("representation", name, _REGISTRY)
    if min(image_shape) < 1:
        raise UserError("image size", f"{image_shape[1]}x{image_shape[2]}", "must be at least 1")
    if grid < 1:
        raise UserError("grid", grid, "must be at least 1")
    kind = _REGISTRY[name]
    extra: dict[str, Any] = {}
    if kind.uses_encoder:
        if encoder is None:
            raise UserError(
                f"representation {name}",
                "no encoder",
                "it reads the classifier that `prepare` trains: use --prepared RUN/prepared, or dino_semantic",
            )
        extra["encoder"] = encoder
    parameters = inspect.signature(kind).parameters
    accepted = [key for key in parameters if key not in ("image_shape", "grid", "encoder")]
    for option, value in options.items():
        if option not in accepted:
            raise unknown_name(f"representation {name}: option", option, accepted)
        wanted = type(parameters[option].default)
        if wanted in _KINDS and type(value) is not wanted and not (wanted is float and type(value) is int):
            raise UserError(f"representation {name}: {option}", repr(value), f"must be {_KINDS[wanted]}")
    with torch.random.fork_rng(devices=[]):  # random weights are always the same ones, and the caller's state is kept
        torch.manual_seed(0)
        representation = kind(image_shape, grid, **extra, **options)
    if not isinstance(getattr(representation, "channels", None), int) or representation.channels < 1:
        raise UserError(
            f"representation {name}", "no channels", "its constructor must set channels to a positive integer"
        )
    representation.options = options
    return representation.requires_grad_(False).eval()


Settings = TypeVar("Settings")


def named_settings(kind: type[Settings], what: str, values: Mapping[str, Any] | None) -> Settings:
    """A dataclass of settings with what ``values`` changes of its defaults.  UserError that names an unknown field."""
    known = list(inspect.signature(kind).parameters)
    for key in values or {}:
        if key not in known:
            raise unknown_name(f"{what} setting", key, known)
    return kind(**(values or {}))


def load_plugin(path: str | Path) -> tuple[str, ...]:
    """Run a user's file, which registers representations; returns their names.  Loading it again replaces them.

    UserError when the file is missing, fails, or registers nothing.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("plugin", path, "no such file")
    module_name = f"fastasync_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise UserError("plugin", path, "must be a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:  # whatever the user's own file raises
        del sys.modules[module_name]
        raise UserError("plugin", path, f"{type(error).__name__}: {error}") from error
    added = tuple(name for name, kind in _REGISTRY.items() if kind.__module__ == module_name)
    if not added:
        raise UserError("plugin", path, "registers no representation: decorate a class with @register('name')")
    for name in added:
        _REGISTRY[name].source = sha256_file(path)
    return added


def checked_encode(representation: Representation, images: Tensor) -> Tensor:
    """``representation.encode(images)``, or a UserError when the result is not float32 [N, channels, grid, grid]."""
    latents = representation.encode(images)
    wanted = [len(images), representation.channels, representation.grid, representation.grid]
    if not isinstance(latents, Tensor) or latents.dtype != torch.float32 or list(latents.shape) != wanted:
        found = f"{latents.dtype} {list(latents.shape)}" if isinstance(latents, Tensor) else type(latents).__name__
        raise UserError(
            f"representation {representation.name}: encode", f"returned {found}", f"must be float32 {wanted}"
        )
    return latents
