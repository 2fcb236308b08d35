"""One subnet for every image: the most faithful one that the whole budget pays for, corrected like PieBridge's.

What routing must beat: the same money spent on a better subnet instead of on some images' exact latents.
"""

from typing import Optional

from ..routing import FixedRoute
from ..training import Plan
from .setting import Setting, most_faithful


def plan(setting: Setting, route: Optional[int] = None) -> Plan:
    """Another subnet than the budget's can be asked for by its index in the family."""
    routing = setting.study.routing
    route = route or most_faithful(setting.family, routing.cost)
    parts = setting.split()
    networks = {0: parts.prefix, route: setting.family.networks[route]}
    runners, seconds = setting.runners(networks)
    policy = FixedRoute(route, min(routing.pairs, len(setting.images)) if routing.correction else 0)
    return Plan(parts, networks, runners, policy, corrected=routing.correction, seconds={"engine": seconds})
