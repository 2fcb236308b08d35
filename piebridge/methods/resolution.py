"""PET on the original's own weights at a lower input resolution, corrected like PieBridge's: the free rival.

The largest input that the budget of the routed methods pays for, in every epoch. No family, nothing pruned, nothing
aligned: what a generated subnet and its routes must beat to have earned their making.
"""

from ..routing import FixedRoute
from ..training import Plan
from .setting import Setting, choose_side, lower_prefix


def plan(setting: Setting) -> Plan:
    routing = setting.study.routing
    setting = setting if setting.side else choose_side(setting)
    parts = setting.split()
    networks = {0: parts.prefix, 1: lower_prefix(setting, parts.prefix, setting.side)}
    runners, seconds = setting.runners(networks)
    policy = FixedRoute(1, routing.paired(len(setting.images)), f"{setting.side} px")
    return Plan(
        parts, networks, runners, policy, corrected=routing.correction,
        seconds={"engine": seconds + setting.side_seconds},
    )
