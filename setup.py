"""The one place that maps folders to packages and builds the extension. Metadata and tools: pyproject.toml.

GRAMOPHONE_BUILD=client installs the client alone: no compiler, no torch.
GRAMOPHONE_CUDA=1 compiles the CUDA kernels, or fails; 0 does not; auto, the default, does if a toolkit fits torch.
TORCH_CUDA_ARCH_LIST says for which devices. Else it is those that this machine has, or all targets if it has none.
"""

import glob
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from setuptools import Distribution, setup

ROOT = Path(__file__).parent
CLIENT_ONLY = os.environ.get("GRAMOPHONE_BUILD") == "client"
CONTRACT = {"gramophone": "proto/gramophone", "gramophone.v1": "proto/gramophone/v1"}


def packages(folder: str, package: str) -> dict[str, str]:
    """A package and those inside it, each with its folder."""
    inits = sorted((ROOT / folder / package).rglob("__init__.py"))
    paths = [init.parent.relative_to(ROOT / folder) for init in inits]
    return {".".join(path.parts): f"{folder}/{path.as_posix()}" for path in paths}


CLIENT = packages("client", "gramophone_client")
SERVER = packages("server", "gramophone_server")
PACKAGES = CONTRACT | CLIENT | ({} if CLIENT_ONLY else SERVER)
COMMANDS = ["gramophone=gramophone_client.cli:main", "gramophone-server=gramophone_server.main:main"]
# Turing to Hopper; whatever is newer compiles the last one's PTX when it first loads it. CUDA 13 knows nothing older.
TARGETS = ["7.5", "8.0", "8.6", "8.9", "9.0+PTX"]


class Toolkit(NamedTuple):
    """A CUDA toolkit: its folder, its version, and the architectures that its compiler knows."""

    home: str
    version: str
    architectures: set[str]


def version() -> str:
    """The version on top of the change log, which is where it is written down."""
    found = re.search(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    if not found:
        raise SystemExit("setup.py: CHANGELOG.md has no released version heading such as '## [0.1.0]'")
    return found.group(1)


def cuda_toolkit() -> Toolkit | None:
    """The toolkit of CUDA_HOME, else of the nvcc on the PATH, else of /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin"] if home else [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    if not nvcc:
        return None

    def told(flag: str, pattern: str) -> list[str]:
        answer = subprocess.run([nvcc, flag, "-x", "cu", os.devnull], capture_output=True, text=True, check=True)
        return re.findall(pattern, answer.stdout + answer.stderr)

    # nvcc itself is asked where it lives, because the one on the PATH may be a script or a link to it.
    return Toolkit(
        os.path.realpath(told("--dryrun", r"TOP=(\S+)")[0]),
        told("--version", r"release (\d+\.\d+)")[0],
        {f"{major}.{minor}" for major, minor in told("--list-gpu-arch", r"compute_(\d+)(\d)\b")},
    )


def cuda() -> Toolkit | None:
    """The toolkit to compile the CUDA kernels with, as GRAMOPHONE_CUDA asks; None for the CPU alone."""
    asked = os.environ.get("GRAMOPHONE_CUDA", "auto")
    if asked not in ("auto", "0", "1"):
        raise SystemExit(f"setup.py: GRAMOPHONE_CUDA is auto, 0 or 1, not {asked!r}")
    if asked == "0":
        return None
    toolkit = cuda_toolkit()
    if not toolkit:
        missing = "there is no nvcc; install the CUDA toolkit, or set CUDA_HOME to where it is"
    else:
        import torch

        of_torch = torch.version.cuda
        if not of_torch:
            missing = f"torch {torch.__version__} is not a CUDA build; install one that is"
        elif of_torch.split(".")[0] != toolkit.version.split(".")[0]:
            missing = (
                f"nvcc is of CUDA {toolkit.version} and torch of CUDA {of_torch}; make the major versions the same"
            )
        else:
            return toolkit
    if asked == "1":
        raise SystemExit(f"setup.py: GRAMOPHONE_CUDA=1, but {missing}, or set GRAMOPHONE_CUDA=0 for the CPU alone")
    print(f"setup.py: the ops are built for the CPU alone: {missing}", file=sys.stderr)
    return None


def cuda_architectures(known: set[str]) -> list[str]:
    """What the kernels are compiled for, of what the compiler knows, in the words of TORCH_CUDA_ARCH_LIST."""
    import torch

    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "native")
    if asked != "native":
        return asked.replace(";", " ").split()
    here = {"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())}
    return sorted(here & known) or [target for target in TARGETS if target.removesuffix("+PTX") in known]


def extension() -> dict[str, object]:
    """The C++ and CUDA ops, compiled against the torch that is installed here."""
    try:
        toolkit = cuda()
        if toolkit:  # before torch's helper looks for it
            os.environ["CUDA_HOME"] = toolkit.home
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError:
        raise SystemExit(
            "setup.py: building the server needs torch; install it first and build with --no-build-isolation "
            "(`make install` does), or set GRAMOPHONE_BUILD=client to install the client alone"
        ) from None
    sources = ["csrc/module.cpp", "csrc/ops.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))]
    # -fopenmp is what makes at::parallel_for parallel outside torch; its libgomp is the one that torch has loaded already.
    flags = {"cxx": ["-O3", "-fno-math-errno", "-fopenmp", "-Wall", "-Wextra", "-Wno-unused-parameter"]}
    options = {"depends": glob.glob("csrc/**/*.*h", recursive=True), "extra_link_args": ["-fopenmp"]}
    if not toolkit:
        ops = CppExtension("gramophone_server._C", sources, extra_compile_args=flags, **options)
    else:
        architectures = cuda_architectures(toolkit.architectures)
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(architectures)  # unset and without a GPU, torch's helper dies
        built_for = [f"-DGRAMOPHONE_CUDA_VERSION={toolkit.version}"]
        built_for += [f"-DGRAMOPHONE_CUDA_ARCHITECTURES={','.join(architectures)}"]
        flags = {"cxx": flags["cxx"] + built_for, "nvcc": ["-O3", "-lineinfo"]}
        ops = CUDAExtension(
            "gramophone_server._C",
            sources + sorted(glob.glob("csrc/cuda/*.cpp") + glob.glob("csrc/cuda/*.cu")),
            extra_compile_args=flags,
            include_dirs=[str(ROOT / "csrc"), str(ROOT / "csrc" / "cuda")],
            **options,
        )
        # The last place to look, for the headers of cuBLAS and cuSPARSE, which torch's own include and a toolkit may lack.
        major = toolkit.version.split(".")[0]
        ops.include_dirs += [str(path) for path in Path(torch.__file__).parent.parent.glob(f"nvidia/cu{major}/include")]

    class BuildOps(BuildExtension):
        """Keeps the objects of every way to build in one place, so that ninja compiles what has changed and no more."""

        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = "build/ops"  # an editable install resets what the `options` of setup() say

    return {"ext_modules": [ops], "cmdclass": {"build_ext": BuildOps}}


class OpsAlone(Distribution):
    """For `setup.py build_ext`: it needs nothing of pyproject.toml, whose licence a setuptools below 77 cannot read."""

    def parse_config_files(self, *_: object, **__: object) -> None:
        """Reads none."""


setup(
    version=version(),
    distclass=OpsAlone if "build_ext" in sys.argv else Distribution,
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
