"""The one place that maps folders to packages and builds the extension. Metadata and tools: pyproject.toml.

GRAMOPHONE_BUILD=client installs the client alone: no compiler, no torch.
"""

import glob
import os
import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
CLIENT_ONLY = os.environ.get("GRAMOPHONE_BUILD") == "client"
CONTRACT = {"gramophone": "proto/gramophone", "gramophone.v1": "proto/gramophone/v1"}
CLIENT = {"gramophone_client": "client/gramophone_client"}
SERVER = {"gramophone_server": "server/gramophone_server"}
PACKAGES = CONTRACT | CLIENT | ({} if CLIENT_ONLY else SERVER)
COMMANDS = ["gramophone=gramophone_client.cli:main", "gramophone-server=gramophone_server.main:main"]


def version() -> str:
    """The version on top of the change log, which is where it is written down."""
    found = re.search(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    if not found:
        raise SystemExit("setup.py: CHANGELOG.md has no released version heading such as '## [0.1.0]'")
    return found.group(1)


def extension() -> dict[str, object]:
    """The C++ ops, compiled against the torch that is installed here."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        raise SystemExit(
            "setup.py: building the server needs torch; install it first and build with --no-build-isolation "
            "(`make install` does), or set GRAMOPHONE_BUILD=client to install the client alone"
        ) from None
    sources = ["csrc/module.cpp", "csrc/ops.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))]
    headers = [*glob.glob("csrc/*.h"), *glob.glob("csrc/cpu/*.h")]
    # -fopenmp is what makes at::parallel_for parallel outside torch; its libgomp is the one that torch has loaded already.
    flags = ["-O3", "-fopenmp", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    return {
        "ext_modules": [
            CppExtension(
                "gramophone_server._C", sources, depends=headers, extra_compile_args=flags, extra_link_args=["-fopenmp"]
            )
        ],
        "cmdclass": {"build_ext": BuildExtension},
    }


setup(
    version=version(),
    package_dir=PACKAGES,
    packages=list(PACKAGES),
    entry_points={"console_scripts": COMMANDS[:1] if CLIENT_ONLY else COMMANDS},
    package_data={
        "gramophone": ["py.typed"],
        "gramophone.v1": ["*.proto", "*.pyi"],
        "gramophone_server": ["py.typed"],
        "gramophone_client": ["py.typed"],
    },
    **({} if CLIENT_ONLY else extension()),
)
