"""Makes the bundle, on a machine with nvcc and a network. Needs no GPU."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

from gpu_bundle.manifest import BUNDLE, ROOT, digest, files_in, size_of, sources, sources_digest

MACHINE = Path(__file__).parent / "machine.txt"
ENVIRONMENT = ROOT / "build" / "gpu-machine"  # a virtual environment with the packages of MACHINE
SCRATCH = ROOT / "build" / "gpu-ops"

PYTHON = "3.12"
ARCHITECTURES = "9.0"  # H100 and H200
# What the server and the client import and the machine lacks, at the versions of constraints.txt. It has grpcio and
# protobuf, but perhaps older ones than the committed stubs need.
PACKAGES = (
    "googleapis-common-protos",
    "grpcio",
    "grpcio-health-checking",
    "grpcio-reflection",
    "grpcio-status",
    "pastiche",
    "protobuf",
)
MAX_BYTES = 64 * 2**20  # of the checkout and the bundle together: a lent machine takes no more


def make() -> None:
    """Fills the folder. Exits with a message if a tool is missing or the result is too large."""
    start = time.monotonic()
    python = environment()
    shutil.rmtree(BUNDLE, ignore_errors=True)
    ops = compile_ops(python, BUNDLE / "ops")
    install_packages(python, BUNDLE / "site")
    torch = output([str(python), "-c", "import torch; print(torch.__version__, torch.version.cuda)"]).split()
    manifest = {
        "made": date.today().isoformat(),
        "commit": output(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]).strip(),
        "python": PYTHON,
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch[0],
        "cuda": torch[1],
        "architectures": ARCHITECTURES.split(";"),
        "sources": sources_digest(),
        "packages": packages_in(BUNDLE / "site"),
        "files": {
            path.relative_to(BUNDLE).as_posix(): {"bytes": path.stat().st_size, "sha256": digest(path)}
            for path in [ops, *sorted((BUNDLE / "site").rglob("*.so"))]
        },
    }
    (BUNDLE / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{ops.relative_to(ROOT)}: {ops.stat().st_size / 2**20:.1f} MiB")
    for name, version in packages_in(BUNDLE / "site").items():
        print(f"  {name} {version}")
    require_size()
    print(f"made in {time.monotonic() - start:.0f} s; `make gpu-rehearsal` runs the check with it, without a GPU")


def require_size() -> None:
    """Prints how much the checkout and the bundle take together; exits with a message if that is too much."""
    bundle, checkout = size_of(files_in(BUNDLE)), size_of(checkout_files())
    sizes = f"{BUNDLE.name} takes {bundle / 2**20:.1f} MiB and the checkout {checkout / 2**20:.1f} MiB"
    if bundle + checkout > MAX_BYTES:
        raise SystemExit(
            f"gpu_bundle: {sizes}; together at most {MAX_BYTES >> 20} MiB can travel. Large files in the checkout: "
            f"{', '.join(largest(checkout_files()))}. Remove them, or add them to .gitignore"
        )
    print(f"{sizes}, of at most {MAX_BYTES >> 20} MiB")


def largest(paths: Sequence[Path]) -> list[str]:
    """The names and sizes of the three largest files."""
    by_size = sorted(paths, key=lambda path: -path.stat().st_size)[:3]
    return [f"{path.relative_to(ROOT)} ({path.stat().st_size / 2**20:.1f} MiB)" for path in by_size]


def environment() -> Path:
    """The Python of a virtual environment with the packages of the GPU machine, which is made if it is missing or
    outdated."""
    python, stamp = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "installed.txt"
    if stamp.exists() and stamp.read_text() == MACHINE.read_text():
        return python
    print(f"installing the packages of {MACHINE.name} into {ENVIRONMENT.relative_to(ROOT)}", flush=True)
    subprocess.run([find_python(), "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
    subprocess.run([*pip(python), "install", "-r", str(MACHINE)], check=True)
    stamp.write_text(MACHINE.read_text())
    return python


def find_python() -> str:
    """A Python of the GPU machine's version: PYTHON312, or the one on the PATH, or one of pyenv's."""
    places = [os.environ.get("PYTHON312"), sys.executable, shutil.which(f"python{PYTHON}")]
    places += sorted(str(path) for path in Path.home().glob(f".pyenv/versions/{PYTHON}.*/bin/python"))
    for place in filter(None, places):
        try:
            version = output([place, "-c", "import sys; print('{}.{}'.format(*sys.version_info))"]).strip()
        except (OSError, subprocess.CalledProcessError):  # such as a shim of pyenv for a version that is not selected
            continue
        if version == PYTHON:
            return place
    raise SystemExit(
        f"gpu_bundle: the GPU machine has Python {PYTHON}, and there is none here; install it, or set PYTHON312 to the "
        "path of one"
    )


def compile_ops(python: Path, folder: Path) -> Path:
    """Compiles the ops for the GPU machine and returns the path of the extension in ``folder``. Debug symbols are
    removed: 20 of 24 MB."""
    print(f"compiling the ops for sm_{ARCHITECTURES.replace('.', '')}", flush=True)
    # From a copy of the sources, because build/ops has objects that were compiled against the torch of .venv.
    shutil.rmtree(SCRATCH / "csrc", ignore_errors=True)
    for path in sources():
        copy = SCRATCH / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    # setup.py reads the version and the description, and finds the packages.
    for name in ("CHANGELOG.md", "README.md", "proto", "client", "server"):
        if not (SCRATCH / name).exists():
            (SCRATCH / name).symlink_to(ROOT / name)
    settings = {"GRAMOPHONE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ARCHITECTURES}
    settings["PATH"] = f"{python.parent}:{os.environ['PATH']}"  # ninja is there
    log = SCRATCH / "build.log"
    command = [str(python), "setup.py", "build_ext", "--build-lib", str(SCRATCH / "lib")]
    if logged(command, log, settings):
        raise SystemExit(f"gpu_bundle: the ops do not compile; the end of {log}:\n{log.read_text()[-3000:]}")
    (built,) = (SCRATCH / "lib").rglob("_C*.so")
    folder.mkdir(parents=True)
    made = Path(shutil.copy2(built, folder))
    subprocess.run(["strip", "--strip-debug", str(made)], check=True)
    return made


def logged(command: list[str], log: Path, settings: Mapping[str, str]) -> int:
    """Runs a command in `SCRATCH` with its output in a file. Returns its exit code."""
    with log.open("w") as out:
        return subprocess.run(
            command, cwd=SCRATCH, env=os.environ | settings, stdout=out, stderr=subprocess.STDOUT, check=False
        ).returncode


def install_packages(python: Path, folder: Path) -> None:
    """Installs `PACKAGES` into ``folder``, without their dependencies."""
    print(f"fetching {', '.join(PACKAGES)}", flush=True)
    command = [*pip(python), "install", "--no-deps", "--no-compile", "--only-binary=:all:", "--target", str(folder)]
    subprocess.run([*command, "-c", str(ROOT / "constraints.txt"), *PACKAGES], check=True)
    shutil.rmtree(folder / "bin", ignore_errors=True)
    for path in folder.rglob("*.so"):
        subprocess.run(["strip", "--strip-debug", str(path)], check=True)


def pip(python: Path) -> list[str]:
    """The start of a quiet pip command."""
    return [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]


def packages_in(site: Path) -> dict[str, str]:
    """The versions of the packages in a folder, by name."""
    found = (re.fullmatch(r"(.+)-([^-]+)\.dist-info", path.name) for path in sorted(site.iterdir()))
    return {match[1]: match[2] for match in found if match}


def checkout_files() -> list[Path]:
    """The files of the checkout that git does not ignore: those that travel."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    paths = (ROOT / name for name in output(command).split("\0") if name)
    return [path for path in paths if path.is_file()]


def output(command: list[str]) -> str:
    """What a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
