"""What a router said: `Routing` is one call, `RoutingTrace` all calls of a run, `record_routing` fills a trace.

Nothing here decides anything; the routers do (`notebook_kit.routers`), on our layers and inside transformers models.
"""

from notebook_kit.routing.decision import Routing, aux_loss
from notebook_kit.routing.record import record_routing, transformers_gates
from notebook_kit.routing.trace import RoutingTrace

__all__ = ["Routing", "RoutingTrace", "aux_loss", "record_routing", "transformers_gates"]
