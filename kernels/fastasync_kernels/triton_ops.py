"""Every fused operation as Triton kernels, under the names and signatures of reference.py.

What is not fused (the generator, broadcasting over channels, a bare RMSNorm that torch.compile fuses by itself) is the
reference's own, so that either namespace can stand in for the other.  Those that end in ``_tops`` have no reference:
they serve linears in fp8 whose casts are kernels too.
"""

from __future__ import annotations

from .adaln import gated_rmsnorm_modulate, rmsnorm_modulate
from .adaln_tops import gated_rmsnorm_modulate_tops, rmsnorm_modulate_tops
from .flow_errors import corrected_loss, flow_errors
from .fp8_casts import cast_columns, cast_rows
from .guided_update import guided_update
from .label_dropout import drop_labels
from .noising import noising
from .qknorm_rope import qknorm_rope
from .reference import draw_noise, per_channel, philox, philox_normal, philox_uniform, rmsnorm, rotate_pairs
from .swiglu import swiglu

__all__ = [
    "cast_columns",
    "cast_rows",
    "corrected_loss",
    "draw_noise",
    "drop_labels",
    "flow_errors",
    "gated_rmsnorm_modulate",
    "gated_rmsnorm_modulate_tops",
    "guided_update",
    "noising",
    "per_channel",
    "philox",
    "philox_normal",
    "philox_uniform",
    "qknorm_rope",
    "rmsnorm",
    "rmsnorm_modulate",
    "rmsnorm_modulate_tops",
    "rotate_pairs",
    "swiglu",
]
