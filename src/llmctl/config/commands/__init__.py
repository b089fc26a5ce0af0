"""One config class per command."""

from llmctl.config.base import Config
from llmctl.config.commands.audit import AuditConfig as AuditConfig
from llmctl.config.commands.chat import ChatConfig as ChatConfig
from llmctl.config.commands.demo import DemoConfig as DemoConfig
from llmctl.config.commands.doctor import DoctorConfig as DoctorConfig
from llmctl.config.commands.dpo import DpoConfig as DpoConfig
from llmctl.config.commands.evaluate import EvaluateConfig as EvaluateConfig
from llmctl.config.commands.generate import GenerateConfig as GenerateConfig
from llmctl.config.commands.merge import MergeConfig as MergeConfig
from llmctl.config.commands.plan import PlanConfig as PlanConfig
from llmctl.config.commands.ppo import PpoConfig as PpoConfig
from llmctl.config.commands.pretrain import PRESETS as PRESETS
from llmctl.config.commands.pretrain import PretrainConfig as PretrainConfig
from llmctl.config.commands.quantize import QuantizeConfig as QuantizeConfig
from llmctl.config.commands.rank import RankConfig as RankConfig
from llmctl.config.commands.report import ReportConfig as ReportConfig
from llmctl.config.commands.reward import RewardConfig as RewardConfig
from llmctl.config.commands.run import RunConfig as RunConfig
from llmctl.config.commands.runs import RunsConfig as RunsConfig
from llmctl.config.commands.sft import SftConfig as SftConfig
from llmctl.config.commands.tokenize import TokenizeConfig as TokenizeConfig


def config_of(stage: str) -> type[Config] | None:
    """Return the config class of a command, None where there is no such command."""
    config: type[Config] | None = globals().get(f"{stage.capitalize()}Config")
    return config
