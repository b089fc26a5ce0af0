"""One config class per command."""

from llmctl.config.base import Config
from llmctl.config.commands.audit import AuditConfig
from llmctl.config.commands.chat import ChatConfig
from llmctl.config.commands.demo import DemoConfig
from llmctl.config.commands.doctor import DoctorConfig
from llmctl.config.commands.dpo import DpoConfig
from llmctl.config.commands.evaluate import EvaluateConfig
from llmctl.config.commands.generate import GenerateConfig
from llmctl.config.commands.merge import MergeConfig
from llmctl.config.commands.plan import PlanConfig
from llmctl.config.commands.ppo import PpoConfig
from llmctl.config.commands.pretrain import PRESETS, PretrainConfig
from llmctl.config.commands.quantize import QuantizeConfig
from llmctl.config.commands.rank import RankConfig
from llmctl.config.commands.report import ReportConfig
from llmctl.config.commands.reward import RewardConfig
from llmctl.config.commands.run import RunConfig
from llmctl.config.commands.runs import RunsConfig
from llmctl.config.commands.sft import SftConfig
from llmctl.config.commands.tokenize import TokenizeConfig

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


def config_of(stage: str) -> type[Config] | None:
    """Return the config class of a command, None where there is no such command."""
    config: type[Config] | None = globals().get(f"{stage.capitalize()}Config")
    return config
