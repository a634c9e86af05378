"""The configs of all commands: the only place where an option's name, type, default, help and checks are declared."""

from ray_jobs.config.jobs import (
    AUTO,
    FITTED,
    OUTPUTS,
    REDUCTIONS,
    AtlasConfig,
    ConceptsConfig,
    DegradeConfig,
    EvaluateConfig,
    ExplainConfig,
    FitConfig,
    MethodsConfig,
    QualityConfig,
    TargetConfig,
)
from ray_jobs.config.model import (
    CROP_MODES,
    INTERPOLATIONS,
    PRECISIONS,
    SPECS,
    ModelConfig,
    Preprocessing,
)
from ray_jobs.config.resources import Resources

__all__ = [
    "AUTO",
    "CROP_MODES",
    "FITTED",
    "INTERPOLATIONS",
    "OUTPUTS",
    "PRECISIONS",
    "REDUCTIONS",
    "SPECS",
    "AtlasConfig",
    "ConceptsConfig",
    "DegradeConfig",
    "EvaluateConfig",
    "ExplainConfig",
    "FitConfig",
    "MethodsConfig",
    "ModelConfig",
    "Preprocessing",
    "QualityConfig",
    "Resources",
    "TargetConfig",
]
