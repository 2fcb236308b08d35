"""PieBridge with its routes drawn at random: the same subnet, correction and budget, no difficulty, no importance.

What a router must beat at equal cost to have earned its place.
"""

from ..training import Plan
from .setting import Setting, shared_plan


def plan(setting: Setting) -> Plan:
    return shared_plan(setting, choice="random")
