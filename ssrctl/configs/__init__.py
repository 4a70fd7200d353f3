"""One dataclass per stage: every setting, its default, and the doc line that `--help` shows."""

from ssrctl.configs.building import build_config
from ssrctl.configs.common import (
    TINY,
    TINY_DATASET,
    CommonConfig,
    DatasetConfig,
    EnvConfig,
    ModelConfig,
    SamplingConfig,
)
from ssrctl.configs.delta import DeltaApplyConfig, DeltaDiffConfig, DeltaInfoConfig
from ssrctl.configs.diagnose import (
    DiagnoseConfig,
    MaskComplementConfig,
    MaskDiffConfig,
    MaskInfoConfig,
    MaskIntersectConfig,
    MaskLayersConfig,
    MaskLowMagnitudeConfig,
    MaskMinusConfig,
    MaskPrincipalConfig,
    MaskRandomConfig,
    MaskUnionConfig,
)
from ssrctl.configs.evaluate import EvalConfig
from ssrctl.configs.masks import ProfileBudgetConfig, SuperweightsConfig
from ssrctl.configs.text import CriticConfig, CriticOptions, SegmentConfig, SegmentOptions
from ssrctl.configs.train import TrainConfig

__all__ = [
    "TINY",
    "TINY_DATASET",
    "CommonConfig",
    "CriticConfig",
    "CriticOptions",
    "DatasetConfig",
    "DeltaApplyConfig",
    "DeltaDiffConfig",
    "DeltaInfoConfig",
    "DiagnoseConfig",
    "EnvConfig",
    "EvalConfig",
    "MaskComplementConfig",
    "MaskDiffConfig",
    "MaskInfoConfig",
    "MaskIntersectConfig",
    "MaskLayersConfig",
    "MaskLowMagnitudeConfig",
    "MaskMinusConfig",
    "MaskPrincipalConfig",
    "MaskRandomConfig",
    "MaskUnionConfig",
    "ModelConfig",
    "ProfileBudgetConfig",
    "SamplingConfig",
    "SegmentConfig",
    "SegmentOptions",
    "SuperweightsConfig",
    "TrainConfig",
    "build_config",
]
