"""PieBridge with every latent kept: each image pays the subnet once, and some images the original once.

The images of the highest loss get the original, a part of them in each epoch of the first third. What was
bought is kept, so nobody is bought twice and a draw would only bring in chance.
"""

from ..training import Plan
from .setting import Setting, shared_plan


def plan(setting: Setting) -> Plan:
    return shared_plan(setting, choice="highest", cached=True)
