"""Memory against time: what a block's backward pass computes again instead of keeping it from the forward pass.

| name | numbers that a block keeps for each token | computed again |
|---|---|---|
| ``none`` | 12 widths + 3 hidden widths (2 with the MLP by quack) | nothing |
| ``selective`` | 7 widths + 2 hidden widths: the products, attention, its inputs | norms, RoPE, SwiGLU |
| ``full`` | 2 widths: its inputs | everything |

``selective`` costs element-wise passes alone (a few per cent of a step), ``full`` a third of the step's FLOPs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

RECOMPUTE = ("none", "selective", "full")
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm")
_OURS = ("fa4", "gated_product")


def _policy(context: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    """Keep what matrix products and attention give, whichever backend computes them."""
    namespace, name = op.name().split("::") if hasattr(op, "name") else ("", str(op))
    name = name.split(".")[0]
    costly = name in _PRODUCTS or "attention" in name or "flash" in namespace + name or name in _OURS
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE


def _nothing(context: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    """Keep nothing.  Without it a compiled block keeps what its partition finds dear (bench/NOTES.md, 2026-11-26)."""
    return CheckpointPolicy.MUST_RECOMPUTE


def recomputed(what: str, function: Callable[..., Any], *inputs: Any) -> Any:
    """``function(*inputs)``, keeping for the backward pass what ``what`` says.  Draws no random numbers."""
    options: dict[str, Any] = {}
    if what == "selective" or torch.compiler.is_compiling():
        policy = _policy if what == "selective" else _nothing
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **options)


def kept_numbers(what: str, width: int, hidden: int, mlp: str = "plain") -> int:
    """Numbers a token that one block keeps: the table above."""
    kept = 2 if mlp == "quack" else 3
    return {"none": 12 * width + kept * hidden, "selective": 7 * width + 2 * hidden, "full": 2 * width}[what]
