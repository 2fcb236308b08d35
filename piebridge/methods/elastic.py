"""ElasticTrainer: full training within a time budget; every few epochs the tensors that pay most are selected.

The selection follows what the tensors are worth on the task at hand and what they cost on the device. The forward pass
always runs through the whole network, so this is what bounds the gain; see `tensor_selection` for the algorithm.
"""

from ..pet import split_all
from ..routing import FixedRoute
from ..tensor_selection import ElasticSelection
from ..training import Plan
from .setting import Setting


def plan(setting: Setting) -> Plan:
    parts = split_all(setting.backbone, setting.classes, setting.seed)
    selection = ElasticSelection(parts.suffix, setting.study.elastic)
    return Plan(
        parts, {}, {0: parts.prefix}, FixedRoute(0), before_epoch=selection.before_epoch, memory=selection
    )
