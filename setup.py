"""Maps folders to packages and builds the extension. Metadata and the configuration of tools are in pyproject.toml.

Environment variables:
GRAMOPHONE_BUILD=client installs only the client, without a compiler and torch.
GRAMOPHONE_CUDA=1 compiles the CUDA kernels or fails; 0 builds for the CPU alone; auto, the default, compiles the CUDA
kernels if a CUDA toolkit matches torch.
TORCH_CUDA_ARCH_LIST lists the architectures to compile for. The default: those of this machine's GPUs, or all of
TARGETS if it has none.
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
    """Maps the names of a package and its subpackages to their folders."""
    inits = sorted((ROOT / folder / package).rglob("__init__.py"))
    paths = [init.parent.relative_to(ROOT / folder) for init in inits]
    return {".".join(path.parts): f"{folder}/{path.as_posix()}" for path in paths}


CLIENT = packages("client", "gramophone_client")
SERVER = packages("server", "gramophone_server")
PACKAGES = CONTRACT | CLIENT | ({} if CLIENT_ONLY else SERVER)
COMMANDS = ["gramophone=gramophone_client.cli:main", "gramophone-server=gramophone_server.command:main"]
# Turing to Hopper. Newer GPUs compile the last target's PTX when they first load it. CUDA 13 supports no older ones.
TARGETS = ["7.5", "8.0", "8.6", "8.9", "9.0+PTX"]


class Toolkit(NamedTuple):
    """A CUDA toolkit: its folder, its version, and the architectures that its compiler supports, such as "9.0"."""

    home: str
    version: str
    architectures: set[str]


def version() -> str:
    """The version: the first release in CHANGELOG.md."""
    found = re.search(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    if not found:
        raise SystemExit("setup.py: CHANGELOG.md has no released version heading such as '## [0.1.0]'")
    return found.group(1)


def long_description() -> str:
    """README.md for a package index, which has none of the other files: without pictures and links that are relative.

    The text of a link stays. Code between fences stays as it is.
    """
    parts = re.split(r"(^```.*?^```$)", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    relative = r"\((?!https?://|mailto:|#)[^)]*\)"
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(rf"!\[[^\]]*\]{relative}\n*", "", parts[i])
        parts[i] = re.sub(rf"\[([^\]]*)\]{relative}", r"\1", parts[i])
    return "".join(parts)


def cuda_toolkit() -> Toolkit | None:
    """The toolkit of CUDA_HOME, else of the nvcc on the PATH, else of /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin"] if home else [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    if not nvcc:
        return None

    def query(flag: str, pattern: str) -> list[str]:
        run = subprocess.run([nvcc, flag, "-x", "cu", os.devnull], capture_output=True, text=True, check=True)
        return re.findall(pattern, run.stdout + run.stderr)

    # The folder is what nvcc itself reports, because the nvcc on the PATH may be a script or a link.
    return Toolkit(
        os.path.realpath(query("--dryrun", r"TOP=(\S+)")[0]),
        query("--version", r"release (\d+\.\d+)")[0],
        {f"{major}.{minor}" for major, minor in query("--list-gpu-arch", r"compute_(\d+)(\d)\b")},
    )


def cuda() -> Toolkit | None:
    """The toolkit for the CUDA kernels according to GRAMOPHONE_CUDA, or None to build for the CPU alone."""
    asked = os.environ.get("GRAMOPHONE_CUDA", "auto")
    if asked not in ("auto", "0", "1"):
        raise SystemExit(f"setup.py: GRAMOPHONE_CUDA must be auto, 0 or 1, got {asked!r}")
    if asked == "0":
        return None
    toolkit = cuda_toolkit()
    if not toolkit:
        missing = "there is no nvcc; install the CUDA toolkit, or set CUDA_HOME to its folder"
    else:
        import torch

        torch_cuda = torch.version.cuda
        if not torch_cuda:
            missing = f"torch {torch.__version__} is not a CUDA build; install a CUDA build of torch"
        elif torch_cuda.split(".")[0] != toolkit.version.split(".")[0]:
            missing = (
                f"nvcc is of CUDA {toolkit.version} and torch of CUDA {torch_cuda}; make the major versions the same"
            )
        else:
            return toolkit
    if asked == "1":
        raise SystemExit(f"setup.py: GRAMOPHONE_CUDA=1, but {missing}, or set GRAMOPHONE_CUDA=0 for the CPU alone")
    print(f"setup.py: the ops are built for the CPU alone: {missing}", file=sys.stderr)
    return None


def cuda_architectures(known: set[str]) -> list[str]:
    """The architectures to compile the kernels for, in the syntax of TORCH_CUDA_ARCH_LIST; `known` to the compiler."""
    import torch

    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "native")
    if asked != "native":
        return asked.replace(";", " ").split()
    own = {"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())}
    return sorted(own & known) or [target for target in TARGETS if target.removesuffix("+PTX") in known]


def extension() -> dict[str, object]:
    """The arguments of setup() for the C++ and CUDA ops, compiled against the installed torch."""
    try:
        toolkit = cuda()
        if toolkit:  # torch.utils.cpp_extension reads it when it is imported
            os.environ["CUDA_HOME"] = toolkit.home
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError:
        raise SystemExit(
            "setup.py: building the server needs torch; install torch first and build with --no-build-isolation "
            "(as `make install` does), or set GRAMOPHONE_BUILD=client to install only the client"
        ) from None
    sources = ["csrc/module.cpp", "csrc/schemas.cpp", *sorted(glob.glob("csrc/cpu/**/*.cpp", recursive=True))]
    # Without -fopenmp at::parallel_for is serial outside torch. The libgomp is the one that torch has already loaded.
    flags = {"cxx": ["-O3", "-fno-math-errno", "-fopenmp", "-Wall", "-Wextra", "-Wno-unused-parameter"]}
    options = {
        "include_dirs": [str(ROOT / "csrc")],
        "depends": sorted(glob.glob("csrc/**/*.*h", recursive=True)),
        "extra_link_args": ["-fopenmp"],
    }
    if not toolkit:
        ops = CppExtension("gramophone_server._C", sources, extra_compile_args=flags, **options)
    else:
        architectures = cuda_architectures(toolkit.architectures)
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(architectures)  # without it torch.utils.cpp_extension needs a GPU
        built_for = [f"-DGRAMOPHONE_CUDA_VERSION={toolkit.version}"]
        built_for += [f"-DGRAMOPHONE_CUDA_ARCHITECTURES={','.join(architectures)}"]
        flags = {"cxx": flags["cxx"] + built_for, "nvcc": ["-O3", "-lineinfo"]}
        ops = CUDAExtension(
            "gramophone_server._C",
            sources
            + sorted(path for end in ("cpp", "cu") for path in glob.glob(f"csrc/cuda/**/*.{end}", recursive=True)),
            extra_compile_args=flags,
            **options,
        )
        # Last in the search order: the headers of cuBLAS and cuSPARSE. torch's headers include them; a toolkit may not
        # have them.
        major = toolkit.version.split(".")[0]
        ops.include_dirs += [str(path) for path in Path(torch.__file__).parent.parent.glob(f"nvidia/cu{major}/include")]

    class BuildOps(BuildExtension):
        """Keeps the objects in one folder for every kind of build, so that ninja compiles only what has changed."""

        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = "build/ops"  # set here because an editable install overrides the `options` of setup()

    return {"ext_modules": [ops], "cmdclass": {"build_ext": BuildOps}}


class OpsAlone(Distribution):
    """Ignores pyproject.toml: `setup.py build_ext` does not need it, and setuptools < 77 cannot read its license."""

    def parse_config_files(self, *_: object, **__: object) -> None:
        """Reads no configuration file."""


setup(
    version=version(),
    long_description=long_description(),
    long_description_content_type="text/markdown",
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
