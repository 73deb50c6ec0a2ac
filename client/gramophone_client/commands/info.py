"""`gramophone info` and `gramophone recipe`: what a server is, and how a picture was made."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict

from gramophone_client.console.recipe_flags import as_flags
from gramophone_client.sync_client import SyncGramophoneClient
from gramophone_client.types.recipe_metadata import recipe_of
from gramophone_client.types.server_info import CacheStats, ServerInfo

__all__ = ["info", "recipe"]


def info(args: argparse.Namespace) -> None:
    """`gramophone info`."""
    with SyncGramophoneClient(args.server) as client:
        if args.wait:
            client.wait_until_ready(args.wait)
        told = client.server_info()
    print(json.dumps(asdict(told), indent=2) if args.json else _described(told))


def recipe(args: argparse.Namespace) -> None:
    """`gramophone recipe`."""
    note = recipe_of(args.picture)
    if args.json:
        print(json.dumps(note._asdict() | {"recipe": asdict(note.recipe)}, indent=2))
    else:
        weights = ",".join(f"{weight:g}" for weight in note.style_weights)
        print(shlex.join(["--seed", str(note.seed), "--style-weights", weights, *as_flags(note.recipe)]))
    if note.changed_at:
        print(
            f"gramophone: the recipe was changed while {args.picture} was made, and is this one from iteration "
            f"{note.changed_at} on; from the start it makes another picture",
            file=sys.stderr,
        )


def _described(told: ServerInfo) -> str:
    limits = told.limits
    rows = {
        "version": told.version,
        "device": f"{told.device}, {told.precision}",
        "network": told.backbone,
        "weights": told.weights,
        "layers": " ".join(told.layers),
        "images": f"at most {limits.max_image_bytes / 2**20:g} MiB and {limits.max_image_pixels / 1e6:g} megapixels",
        "results": f"at most {limits.max_size} px, {limits.max_iterations} iterations, {limits.max_styles} styles",
        "jobs": f"{told.running_jobs} of at most {limits.max_running} running, "
        f"{told.queued_jobs} of at most {limits.max_queued} waiting, {told.paused_jobs} paused",
        "wait": "not measured yet" if told.estimated_wait_s is None else f"about {told.estimated_wait_s:.1f} s",
        "watchers": f"at most {limits.max_watchers} of a job; one may pause it, for at most {limits.max_paused_s} s",
        "states": f"checkpoints of at most {limits.max_checkpoint_bytes / 2**20:g} MiB",
        "styles": _cached(told.style_cache),
        "uploads": _cached(told.uploads),
        "presets": ", ".join(told.presets),
    }
    return "\n".join(f"{name:<9}{value}" for name, value in rows.items())


def _cached(cache: CacheStats) -> str:
    asked = cache.hits + cache.misses
    return f"{cache.bytes / 2**20:.1f} of at most {cache.max_bytes / 2**20:g} MiB kept, {cache.hits} of {asked} found there"
