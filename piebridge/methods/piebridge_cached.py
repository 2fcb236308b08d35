"""PieBridge with every latent kept: each image pays the subnet once, and some images the original once.

Which images get the original is decided by their loss during the first third of the epochs, a part in each; what was
bought is kept.
"""

from ..training import Plan
from .setting import Setting, shared_plan


def plan(setting: Setting) -> Plan:
    return shared_plan(setting, cached=True)
