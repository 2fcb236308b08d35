"""PieBridge: a cheap subnet for most images, the original for those whose loss (and difficulty) say they need it.

The subnet's latents are corrected towards the original's by a ridge map learned on the device from pairs. Pays
wherever the frozen prefix dominates and latents cannot simply be kept; see `routing` for the algorithm.
"""

from ..training import Plan
from .setting import Setting, shared_plan


def plan(setting: Setting) -> Plan:
    return shared_plan(setting)
