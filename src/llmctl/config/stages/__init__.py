"""One config class per command."""

from llmctl.config.stages.alignment import RewardConfig
from llmctl.config.stages.dpo import DpoConfig
from llmctl.config.stages.evaluating import EvaluateConfig
from llmctl.config.stages.feedback import RankConfig
from llmctl.config.stages.finetuning import AuditConfig, MergeConfig, SftConfig
from llmctl.config.stages.housekeeping import DemoConfig, DoctorConfig, RunConfig, RunsConfig
from llmctl.config.stages.planning import PlanConfig
from llmctl.config.stages.ppo import PpoConfig
from llmctl.config.stages.pretraining import PRESETS, PretrainConfig, TokenizeConfig
from llmctl.config.stages.reporting import ReportConfig
from llmctl.config.stages.shrinking import QuantizeConfig
from llmctl.config.stages.using import ChatConfig, GenerateConfig

__all__ = [
    "PRESETS",
    "AuditConfig",
    "ChatConfig",
    "DemoConfig",
    "DoctorConfig",
    "DpoConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "MergeConfig",
    "PlanConfig",
    "PpoConfig",
    "PretrainConfig",
    "QuantizeConfig",
    "RankConfig",
    "ReportConfig",
    "RewardConfig",
    "RunConfig",
    "RunsConfig",
    "SftConfig",
    "TokenizeConfig",
]
