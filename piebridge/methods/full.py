"""Full training: every parameter is trained.

Nothing is frozen, so nothing can be cached or approximated; every image pays the whole forward and backward pass in
every epoch. The upper yardstick of cost; often, with few images, not of accuracy.
"""

from ..pet import split_all
from ..routing import FixedRoute
from ..training import Plan
from .setting import Setting


def plan(setting: Setting) -> Plan:
    parts = split_all(setting.backbone, setting.classes, setting.seed)
    return Plan(parts, {}, {0: parts.prefix}, FixedRoute(0))
