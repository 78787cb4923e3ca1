"""One file per subject, each with ``run(bench)``; this order is the order of importance in a limited session."""

SUBJECTS = (
    "noising",
    "loss",
    "adaln",
    "qknorm_rope",
    "swiglu",
    "mlp",
    "attention",
    "optimizer",
    "step",
    "schedule_overhead",
    "engine",
    "block",
    "memory",
    "sampling",
    "probe",
    "fp8",
    "fp8_casts",
    "data",
    "encode",
    "repa",
)
