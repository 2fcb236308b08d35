"""PruneTrain: full training with a group lasso; channels that it has emptied are removed while training.

Steps become cheaper as the network shrinks, and so does the network that is evaluated and kept: this is the one method
whose result is not used with the original. See `channel_pruning` for the algorithm.
"""

from ..channel_pruning import ChannelPruning
from ..pet import split_all
from ..routing import FixedRoute
from ..training import Plan
from .setting import Setting


def plan(setting: Setting) -> Plan:
    parts = split_all(setting.backbone, setting.classes, setting.seed)
    pruning = ChannelPruning(parts.suffix, setting.study.prune)
    return Plan(
        parts, {}, {0: parts.prefix}, FixedRoute(0), before_epoch=pruning.before_epoch, penalty=pruning.penalty,
        rebuilds=pruning.rebuilds, memory=pruning,
    )
