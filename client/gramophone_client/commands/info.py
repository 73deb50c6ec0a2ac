"""`gramophone info` and `gramophone recipe`: the properties of a server, and the recipe of a picture."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict

from gramophone_client.commands.clients import client
from gramophone_client.console.recipe_flags import as_flags
from gramophone_client.types.recipe_metadata import recipe_of
from gramophone_client.types.server_info import CacheStats, ServerInfo

__all__ = ["info", "recipe"]


def info(args: argparse.Namespace) -> None:
    """`gramophone info`."""
    with client(args) as connected:
        server = connected.server_info()
    print(json.dumps(asdict(server), indent=2) if args.json else _described(server))


def recipe(args: argparse.Namespace) -> None:
    """`gramophone recipe`."""
    metadata = recipe_of(args.picture)
    if args.json:
        print(json.dumps(metadata._asdict() | {"recipe": asdict(metadata.recipe)}, indent=2))
    else:
        weights = ",".join(f"{weight:g}" for weight in metadata.style_weights)
        print(shlex.join(["--seed", str(metadata.seed), "--style-weights", weights, *as_flags(metadata.recipe)]))
    if metadata.changed_at:
        print(
            f"gramophone: the recipe was changed while {args.picture} was made, and is this one from iteration "
            f"{metadata.changed_at} on; from the start it makes another picture",
            file=sys.stderr,
        )


def _described(server: ServerInfo) -> str:
    limits = server.limits
    rows = {
        "version": server.version,
        "device": f"{server.device}, {server.precision}",
        "network": server.backbone,
        "weights": server.weights,
        "layers": " ".join(server.layers),
        "images": f"at most {limits.max_image_bytes / 2**20:g} MiB and {limits.max_image_pixels / 1e6:g} megapixels; "
        f"in messages of at most {limits.max_message_bytes / 2**20:g} MiB, larger ones by upload",
        "results": f"at most {limits.max_size} px, {limits.max_iterations} iterations, {limits.max_styles} styles",
        "jobs": f"{server.running_jobs} of at most {limits.max_running} running, "
        f"{server.queued_jobs} of at most {limits.max_queued} waiting, {server.paused_jobs} paused",
        "wait": "not measured yet" if server.estimated_wait_s is None else f"about {server.estimated_wait_s:.1f} s",
        "watchers": f"at most {limits.max_watchers} of a job; one may pause it, for at most {limits.max_paused_s} s",
        "states": f"checkpoints of at most {limits.max_checkpoint_bytes / 2**20:g} MiB",
        "styles": _cached(server.style_cache),
        "uploads": _cached(server.uploads),
        "presets": ", ".join(server.presets),
    }
    if server.library_ops:
        reasons = "; ".join(f"{op} ({reason})" for op, reason in server.library_ops.items())
        rows["kernels"] = f"these ops run through torch's library, which is slower: {reasons}"
    return "\n".join(f"{name:<9}{value}" for name, value in rows.items())


def _cached(cache: CacheStats) -> str:
    size, max_size = cache.bytes / 2**20, cache.max_bytes / 2**20
    return f"{size:.1f} of at most {max_size:g} MiB kept, {cache.hits} of {cache.hits + cache.misses} found there"
