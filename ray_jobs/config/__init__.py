"""The configs of all commands: the only place where an option's name, type, default, help and checks are declared."""

from ray_jobs.config.jobs import (
    CROP_MODES,
    FITTED,
    INTERPOLATIONS,
    OUTPUTS,
    PRECISIONS,
    REDUCTIONS,
    DegradeConfig,
    EvaluateConfig,
    ExplainConfig,
    FitConfig,
    MethodsConfig,
    ModelConfig,
    Preprocessing,
    QualityConfig,
    Resources,
    equal_share,
)

__all__ = [
    "CROP_MODES",
    "FITTED",
    "INTERPOLATIONS",
    "OUTPUTS",
    "PRECISIONS",
    "REDUCTIONS",
    "DegradeConfig",
    "EvaluateConfig",
    "ExplainConfig",
    "FitConfig",
    "MethodsConfig",
    "ModelConfig",
    "Preprocessing",
    "QualityConfig",
    "Resources",
    "equal_share",
]
