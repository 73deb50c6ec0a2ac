"""How much of its limits a server uses: what `telemetry.health` shows as gauges."""

from __future__ import annotations

from gramophone_server.config import Limits
from gramophone_server.rpc.connections import count_connections
from gramophone_server.rpc.servicer import Servicer
from gramophone_server.rpc.standard_calls import StandardCalls
from gramophone_server.scheduling.scheduler import Scheduler
from gramophone_server.telemetry.health import Usage

__all__ = ["budgets", "places"]


def budgets(servicer: Servicer, scheduler: Scheduler, limits: Limits) -> dict[str, Usage]:
    """Bytes by budget, with the names of the parts of `memory_bound`. Thread-safe."""
    receiver, uploads = servicer.receiver, servicer.uploads.counts
    shared = {
        "receiving": receiver.requests.budget,
        "small messages": receiver.small.budget,
        "health checks": receiver.probes.budget,
        "commands": receiver.commands.budget,
        "decoded": servicer.admission.decoded,
        "sending": servicer.sending,
    }
    return {
        **{name: Usage(budget.used, budget.max_bytes) for name, budget in shared.items()},
        "uploads": Usage(uploads.bytes, uploads.max_bytes),
        "kept jobs": Usage(servicer.jobs.kept_bytes, limits.max_kept_bytes),
        "parked jobs": Usage(scheduler.parked_bytes, scheduler.max_parked_bytes),
    }


def places(servicer: Servicer, probes: StandardCalls, limits: Limits, port: int) -> dict[str, Usage]:
    """Places by what takes them, on a server that listens on ``port``. Thread-safe."""
    calls, checks, connections = servicer.calls.places, probes.places, count_connections(port)
    return {
        **({} if connections is None else {"connections": Usage(connections, limits.max_connections)}),
        "calls": Usage(calls.taken, calls.max_calls),
        "health checks": Usage(checks.taken, checks.max_calls),
        "decoders": Usage(servicer.admission.decoders.busy, limits.max_decoders),
    }
