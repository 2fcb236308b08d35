"""Parameter-efficient training as it should be done: the honest baseline.

The original prefix runs without gradients, in evaluation mode and in batches that suit the machine; only the suffix
is trained. There is no router and no subnet on its path.
"""

from ..training import Plan
from .setting import Setting, frozen_plan


def plan(setting: Setting) -> Plan:
    return frozen_plan(setting, cached=False)
