"""One dataclass per command: every setting, its default, and the doc line that `--help` shows."""

from ssrctl.configs.building import Config, build_config
from ssrctl.configs.common import (
    TINY,
    TINY_DATASET,
    CommonConfig,
    DatasetConfig,
    ModelConfig,
    ProcessOptions,
    PromptOptions,
    SamplingConfig,
    is_bundled,
)
from ssrctl.configs.critic import CriticConfig, CriticOptions
from ssrctl.configs.delta import DeltaApplyConfig, DeltaDiffConfig, DeltaInfoConfig
from ssrctl.configs.diagnose import DiagnoseConfig
from ssrctl.configs.doctor import DoctorConfig
from ssrctl.configs.eval import EvalConfig
from ssrctl.configs.mask import (
    MaskCompareConfig,
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
from ssrctl.configs.profile_budget import ProfileBudgetConfig
from ssrctl.configs.push import PushConfig
from ssrctl.configs.recipes import RecipesConfig
from ssrctl.configs.report import ReportConfig
from ssrctl.configs.segment import SegmentConfig, SegmentOptions
from ssrctl.configs.serve_rollouts import ServeRolloutsConfig
from ssrctl.configs.superweights import SuperweightsConfig
from ssrctl.configs.train import TrainConfig

__all__ = [
    "TINY",
    "TINY_DATASET",
    "CommonConfig",
    "Config",
    "CriticConfig",
    "CriticOptions",
    "DatasetConfig",
    "DeltaApplyConfig",
    "DeltaDiffConfig",
    "DeltaInfoConfig",
    "DiagnoseConfig",
    "DoctorConfig",
    "EvalConfig",
    "MaskCompareConfig",
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
    "ProcessOptions",
    "ProfileBudgetConfig",
    "PromptOptions",
    "PushConfig",
    "RecipesConfig",
    "ReportConfig",
    "SamplingConfig",
    "SegmentConfig",
    "SegmentOptions",
    "ServeRolloutsConfig",
    "SuperweightsConfig",
    "TrainConfig",
    "build_config",
    "is_bundled",
]
