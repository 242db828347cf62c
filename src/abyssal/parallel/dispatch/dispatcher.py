"""The dispatcher of experts that are spread over ranks.

Legend: T tokens of this rank, K experts a token, N rows for this rank's experts, D hidden.
"""

from __future__ import annotations

from torch import Tensor

from abyssal.model.dispatcher import ExpertRows, InFlight
from abyssal.parallel.dispatch.direct import DirectPlanner
from abyssal.parallel.dispatch.node_limited import NodeLimitedPlanner
from abyssal.parallel.dispatch.payload import Fp8Payload, PlainPayload
from abyssal.parallel.dispatch.plan import DispatchPlan
from abyssal.parallel.dispatch.transfer import AsyncHandle, FromExperts, ToExperts, finish, start
from abyssal.parallel.dispatch.volume import TRANSFERS, CommunicationVolume, TransferName


class ExpertParallelDispatcher:
    """Brings rows to experts on other ranks and back (`model.dispatcher`); drops none. One serves every layer.

    Every rank of the group must take part in every call, be it without a token, in the same order. A start and its
    finish may be called apart; so may their backward passes, where autograd is cut between them.

    What goes to experts, rows in a dispatch and their gradients in the backward pass of a combine, may go in FP8; what
    comes from them keeps its type. The gradient of the rounding is that of the identity. As published (§3.3.3).

    `volumes` count what this rank has sent, forward and backward apart.
    """

    def __init__(self, planner: DirectPlanner | NodeLimitedPlanner, *, fp8: bool = False) -> None:
        """Send as `planner` plans; to experts in FP8, if asked for."""
        self.planner, self._fp8 = planner, fp8
        self.volumes = {name: CommunicationVolume() for name in TRANSFERS}

    def start_dispatch(self, hidden: Tensor, weights: Tensor, experts: Tensor) -> InFlight:
        """Plan, with one wait for other ranks and the device, and start to send each token to its experts.

        Args:
            hidden: [T, D]; T may differ from rank to rank, and be 0.
            weights: [T, K], routing weights in at least fp32.
            experts: [T, K] indices.
        """
        plan = self.planner.plan(experts, self.volumes["dispatch"])
        back = FromExperts(plan, self.volumes["dispatch_backward"])
        return start(AsyncHandle(plan, self._to_experts(plan, hidden, "dispatch"), back), hidden, weights.flatten())

    def finish_dispatch(self, in_flight: InFlight) -> ExpertRows:
        """Wait for the rows of this rank's experts: [N, D], [N]."""
        rows, row_weights = finish(in_flight)
        plan = in_flight.handle.plan
        return ExpertRows(rows, row_weights, plan.counts, origin=plan)

    def start_combine(self, rows: Tensor, origin: DispatchPlan) -> InFlight:
        """Start to send the experts' rows [N, D] back."""
        back = self._to_experts(origin, rows, "combine_backward")
        return start(AsyncHandle(origin, FromExperts(origin, self.volumes["combine"]), back), rows)

    def finish_combine(self, in_flight: InFlight) -> Tensor:
        """Wait, and return the sum of each token's rows: [T, D]."""
        (rows,) = finish(in_flight)
        return rows

    def _to_experts(self, plan: DispatchPlan, rows: Tensor, name: TransferName) -> ToExperts:
        payload = Fp8Payload(rows.shape[1], rows.dtype) if self._fp8 else PlainPayload()
        return ToExperts(plan, payload, self.volumes[name])
