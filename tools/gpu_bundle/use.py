"""Uses the bundle on the GPU machine: runs the GPU check with its ops and packages."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_bundle.manifest import BUNDLE, ROOT, describe, digest, read, running_python, sources_digest

PACKAGE = ROOT / "server" / "gramophone_server"
PROJECT = ("proto", "server", "client", "tools", "")  # folders of the project's packages


def run(arguments: Sequence[str]) -> int:
    """Runs the GPU check and returns its exit code. Its ops are the bundle's; if they do not fit, the reason is printed
    and they are compiled here. The time limit of the check counts from now."""
    began = time.monotonic()
    reason = misfit()
    if reason:
        print(f"the ops are compiled here: {reason}", flush=True)
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        code = subprocess.run(command, cwd=ROOT, env=os.environ | {"GRAMOPHONE_CUDA": "1"}, check=False).returncode
        if code:
            return code
    else:
        place(BUNDLE / "ops" / extension_name())
        print(f"the bundle fits, nothing is compiled: {describe(read())}", flush=True)
    print(f"ready after {time.monotonic() - began:.0f} s", flush=True)
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--began", str(began), *arguments]
    paths = os.pathsep.join(search_path())
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, check=False).returncode


def search_path() -> list[str]:
    """Where Python finds the project, and the bundle's packages if they are for this Python."""
    project = [str(ROOT / name) for name in PROJECT]
    return [str(BUNDLE / "site"), *project] if read().get("python") == running_python() else project


def extension_name() -> str:
    """The file name of the extension for this Python."""
    return f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def place(ops: Path) -> None:
    """Copies the extension to its place in the server's package, in one step: another process may have it loaded."""
    target = PACKAGE / ops.name
    new = target.with_suffix(".new")
    try:
        shutil.copy2(ops, new)
        new.replace(target)
    except OSError as error:
        why = f"the ops must be copied to {PACKAGE.relative_to(ROOT)}, in a checkout that can be written: {error}"
        raise SystemExit(f"gpu_bundle: {why}") from None


def misfit() -> str | None:
    """Why the bundle's ops cannot be used with this machine and these sources, None if they can."""
    if not BUNDLE.exists():
        return f"there is no {BUNDLE.name}, which `make gpu-bundle` makes"
    manifest = read()
    if not manifest:
        return f"{BUNDLE.name} has no complete manifest.json"
    here = f"{platform.system()} {platform.machine()}"
    if manifest["platform"] != here:
        return f"the bundle is for {manifest['platform']}, and this is {here}"
    if manifest["python"] != running_python():
        return f"the bundle is for Python {manifest['python']}, and this is {running_python()}"
    if manifest["sources"] != sources_digest():
        return f"csrc or setup.py has changed since the bundle was made, from {manifest['commit']}"
    for name, file in manifest["files"].items():
        if not (BUNDLE / name).exists() or digest(BUNDLE / name) != file["sha256"]:
            return f"{BUNDLE.name}/{name} is missing or damaged"
    return torch_misfit(manifest, probe(BUNDLE / "ops" / extension_name()))


# Prints what `torch_misfit` needs to know, and loads the extension last.
PROBE = """\
import importlib.util, json, sys, torch
capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "capability": capability}), flush=True)
spec = importlib.util.spec_from_file_location("gramophone_server._C", sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


def probe(extension: Path) -> dict[str, Any]:
    """What torch is here, and whether the extension can be loaded.

    The keys: "torch" and "cuda", versions; "capability" of the GPU, None without one; "failure" to load the extension,
    "" if there was none. If torch cannot be imported, only "failure". In a process of its own, because an extension for
    another torch can end the process that loads it.
    """
    ran = subprocess.run([sys.executable, "-c", PROBE, str(extension)], capture_output=True, text=True, check=False)
    last = (ran.stderr.strip().splitlines() or [f"its process ended with {ran.returncode}"])[-1]
    found = json.loads(ran.stdout.splitlines()[0]) if ran.stdout else {}
    return found | {"failure": last if ran.returncode else ""}


def torch_misfit(manifest: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """Why the ops do not fit this machine's torch or GPU, None if they do. ``here``: from `probe`."""
    if "torch" not in here:
        return f"torch cannot be imported: {here['failure']}"
    if here["torch"].split("+")[0] != manifest["torch"].split("+")[0]:
        return f"the bundle is for torch {manifest['torch']}, and this is {here['torch']}"
    if here["cuda"] != manifest["cuda"]:
        return f"the bundle is for a torch of CUDA {manifest['cuda']}, and this one is of CUDA {here['cuda']}"
    if here["capability"]:
        major, minor = here["capability"]
        built = [tuple(map(int, each.split("."))) for each in manifest["architectures"]]
        # Machine code runs on later GPUs of its major version.
        if not any(b_major == major and b_minor <= minor for b_major, b_minor in built):
            return f"the bundle is for {', '.join(manifest['architectures'])}, and the GPU has {major}.{minor}"
    if here["failure"]:  # such as a C library that is too old
        return f"the bundle's ops cannot be loaded: {here['failure']}"
    return None
