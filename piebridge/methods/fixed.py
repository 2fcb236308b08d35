"""One subnet for every image: the most faithful that the budget pays for beside its pairs, corrected like PieBridge's.

What routing must beat: the same money spent on a better subnet instead of on some images' exact latents.
"""

from typing import Optional

from ..routing import FixedRoute
from ..training import Plan
from .setting import Setting, most_faithful


def plan(setting: Setting, route: Optional[int] = None) -> Plan:
    """Another subnet than the budget's can be asked for by its index in the family."""
    routing, route = setting.study.routing, route or best_route(setting)
    parts = setting.split()
    networks = {0: parts.prefix, route: setting.family.networks[route]}
    runners, seconds = setting.runners(networks)
    policy = FixedRoute(route, routing.paired(len(setting.images)))
    return Plan(parts, networks, runners, policy, corrected=routing.correction, seconds={"engine": seconds})


def best_route(setting: Setting) -> int:
    """The family's index of the most faithful subnet that the budget pays for beside the pairs, by the manifest."""
    study, count = setting.study, len(setting.images)
    left = study.routing.cost - study.routing.paired(count) / (study.training.epochs * count)
    return most_faithful(setting.family, left)
