"""A trained SemVAE on disk: ``NAME.safetensors``, and ``NAME.json`` with its shape, hash and origin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastasync.errors import UserError
from fastasync.files import load_tensors, save_tensors, write_json
from fastasync.representations.semvae import SemVAE

FORMAT = 1
_SHAPE = ("feature_dim", "channels", "grid", "width", "depth", "heads")
TRAIN = "fastasync train-semvae --data IMAGES --vit-weights FILE --out DIR"
_FIELD = "semvae"


def save_semvae(path: str | Path, vae: SemVAE, width: int, depth: int, heads: int, facts: Mapping[str, Any]) -> None:
    """Write both files, the JSON last.  ``facts``: JSON values, among them ``vit`` {"name", "fingerprint" or None}."""
    path = Path(path)
    sha256 = save_tensors(path, vae.state_dict())
    shape = dict(zip(_SHAPE, (vae.feature_dim, vae.channels, vae.grid, width, depth, heads)))
    write_json(path.with_suffix(".json"), {"format": FORMAT, **shape, "sha256": sha256, **facts})


def load_semvae(path: str | Path) -> tuple[SemVAE, dict[str, Any]]:
    """A SemVAE, frozen, on the CPU, and the content of its JSON.  UserError when it is missing or altered."""
    if not str(path):
        raise UserError(_FIELD, "(not given)", f"train one with `{TRAIN}` and give its semvae.safetensors")
    path = Path(path)
    file = path.with_suffix(".json")
    if not path.is_file() or not file.is_file():
        absent = file if path.is_file() else path
        raise UserError(_FIELD, absent, f"no such file: make it with `{TRAIN}`")
    try:
        facts = json.loads(file.read_text())
        if facts["format"] != FORMAT:
            raise UserError(_FIELD, file, f"format {facts['format']}; this version reads format {FORMAT}")
        with torch.device("meta"):
            vae = SemVAE(*(int(facts[name]) for name in _SHAPE))
        sha256, _ = facts["sha256"], facts["vit"]["fingerprint"]
    except (ValueError, KeyError, TypeError):
        raise UserError(_FIELD, file, f"not readable: make it again with `{TRAIN}`") from None
    tensors = load_tensors(path, sha256, f"make it again with `{TRAIN}`")
    try:
        vae.load_state_dict(tensors, assign=True)
    except RuntimeError:
        raise UserError(_FIELD, file, f"does not describe {path.name}: make both again with `{TRAIN}`") from None
    return vae.requires_grad_(False).eval(), facts
