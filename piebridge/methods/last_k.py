"""The last blocks and the head are trained, the rest is frozen: the oldest kind of transfer learning."""

from ..config import PetConfig
from ..pet import split
from ..routing import FixedRoute
from ..training import Plan
from .setting import Setting


def plan(setting: Setting) -> Plan:
    last_blocks = PetConfig(kind="last_k", blocks=setting.study.training.last_k)
    parts = split(setting.backbone, last_blocks, setting.classes, setting.seed)
    networks = {0: parts.prefix}
    runners, seconds = setting.runners(networks)
    return Plan(parts, networks, runners, FixedRoute(0), seconds={"engine": seconds})
