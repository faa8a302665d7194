"""Why an endpoint was picked: for the client that asks, and for the log when a request moves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from kubeai.logs import get_logger

if TYPE_CHECKING:
    from kubeai._counts import Reservation
    from kubeai._prompt import Prompt
    from kubeai.routing.routes import Route, Strategy

log = get_logger(__name__)

CANDIDATES_MAX = 16  # the cheapest; a header has its limits

_encode = msgspec.json.Encoder().encode


def explanation(
    strategy: Strategy,
    prompt: Prompt,
    reservation: Reservation,
    candidates: list[dict[str, Any]],
) -> bytes:
    """The value of the X-KubeAI-Explain header: JSON on one line.

    ``candidates``: what `Picker.explain` returned before the pick.
    """
    cheapest = sorted(candidates, key=lambda one: one["cost"])[:CANDIDATES_MAX]
    for one in cheapest:
        one["slowness"] = round(one["slowness"], 2)
        one["cost"] = round(one["cost"])
    return _encode(
        {
            "strategy": strategy,
            "endpoint": reservation.name,
            "tokens": prompt.tokens,
            "first": reservation.first,
            **comparison(strategy, reservation),
            "candidates": cheapest,
        }
    )


def log_move(request_id: str, route: Route, reservation: Reservation, suppressed: int) -> None:
    """Log that a request goes to another endpoint than the first candidate.

    ``suppressed``: how many such requests were not logged since the last one.
    """
    log.info(
        "request moved off its first endpoint",
        request_id=request_id,
        model=route.model,
        endpoint=reservation.name,
        first=reservation.first,
        suppressed=suppressed,
        **comparison(route.strategy, reservation),
    )


def comparison(strategy: Strategy, reservation: Reservation) -> dict[str, float]:
    """What the pick compared between the chosen endpoint and the first candidate.

    Under PrefixCache, what both were believed to have cached, and both costs, in tokens; otherwise
    the load of the first candidate, what this request would have added, and the bound, in requests.
    """
    if strategy == "PrefixCache":
        moved = reservation.first != reservation.name
        return {
            "cached": reservation.cached,
            "cost": round(reservation.cost),
            "first_cached": reservation.first_cached if moved else reservation.cached,
            "first_cost": round(reservation.first_cost if moved else reservation.cost),
        }
    return {
        "first_load": round(reservation.first_load, 2),
        "own_load": round(reservation.own_load, 2),
        "bound": reservation.bound,
    }
