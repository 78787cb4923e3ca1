"""Packages fastasync and fastasync_kernels, and builds the libraries of csrc/ (AdamW, a reader of files) with the
compilers that are there.

The CPU libraries need g++ (or $CXX), the CUDA one nvcc; whatever is missing is left out with one line (pip -v shows
it), and PyTorch or Python does the same.  FASTASYNC_BUILD_CUDA=0 leaves the CUDA library out, =1 makes its
absence an error.  nvcc's own variable NVCC_APPEND_FLAGS adds flags.  Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fopenmp"]
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static"),
    *("-gencode", "arch=compute_80,code=sm_80"),
    *("-gencode", "arch=compute_90,code=[sm_90,compute_90]"),  # newer GPUs compile the PTX when they load it
]


def find_nvcc() -> str | None:
    """nvcc from $CUDA_HOME, the PATH or the usual place."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = [shutil.which("nvcc", path=str(Path(home) / "bin")) for home in homes]
    return next(filter(None, [*found, shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin")]), None)


class BuildLibraries(build_ext):
    """Plain shared libraries for ctypes, independent of the Python and torch versions."""

    extensions: list[Extension]

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def run(self) -> None:
        wanted = os.environ.get("FASTASYNC_BUILD_CUDA", "")
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
        nvcc = None if wanted == "0" else find_nvcc()
        if wanted == "1" and nvcc is None:
            raise SystemExit("FASTASYNC_BUILD_CUDA=1, but there is no nvcc: put it on the PATH or set CUDA_HOME")
        reason = "FASTASYNC_BUILD_CUDA=0" if wanted == "0" else "no nvcc"
        cxx = [*compiler.split(), *CXX_FLAGS] if compiler else None
        cuda = [nvcc, *NVCC_FLAGS] if nvcc else None
        plans = (
            ("compiled AdamW for cpu", cxx, "no C++ compiler", "PyTorch runs the step"),
            ("compiled AdamW for cuda", cuda, reason, "PyTorch runs the step"),
            ("compiled reader of files", cxx, "no C++ compiler", "Python reads"),
        )
        built = [self.compile(extension, *plan) for extension, plan in zip(self.extensions, plans)]
        if wanted == "1" and not built[1]:
            raise SystemExit("FASTASYNC_BUILD_CUDA=1, but nvcc failed (see above)")
        self.extensions = [extension for extension, done in zip(self.extensions, built) if done]
        if self.inplace:  # also what an editable install uses
            self.copy_extensions_to_source()

    def compile(self, extension: Extension, what: str, command: list[str] | None, absent: str, instead: str) -> bool:
        """Build one library.  False, with one line that says why, if it cannot be."""
        name = Path(self.get_ext_filename(extension.name))
        target = (self.build_lib / name).absolute()
        for old in (target, ROOT / name) if self.inplace else (target,):
            old.unlink(missing_ok=True)  # a library of other sources must not survive
        if command is None:
            print(f"fastasync: {what} left out ({absent}); {instead} instead")
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        result = subprocess.run(
            [*command, "-o", str(target), str(ROOT / extension.sources[0])], capture_output=True, text=True
        )
        if result.returncode != 0:
            error = next(iter((result.stderr or result.stdout).strip().splitlines()), "no message")
            print(f"fastasync: {what} left out ({command[0]} failed: {error}); {instead} instead")
            return False
        print(f"fastasync: built {target.name}")
        return True


def version() -> str:
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "fastasync" / "__init__.py").read_text(), re.MULTILINE)
    assert found is not None
    return found.group(1)


setup(
    name="fastasync",
    version=version(),
    description="Learned asynchronous schedules for multi-representation flow matching",
    python_requires=">=3.11",
    packages=[*find_packages(".", include=["fastasync", "fastasync.*"]), *find_packages("kernels")],
    package_dir={"fastasync": "fastasync", "fastasync_kernels": "kernels/fastasync_kernels"},
    ext_modules=[
        Extension("fastasync.optim._adamw_cpu", ["csrc/fused_adamw.cpp"], depends=["csrc/adamw.h"]),
        Extension("fastasync.optim._adamw_cuda", ["csrc/fused_adamw.cu"], depends=["csrc/adamw.h"]),
        Extension("fastasync.images._read_files", ["csrc/read_files.cpp"]),
    ],
    cmdclass={"build_ext": BuildLibraries},
    entry_points={"console_scripts": ["fastasync = fastasync.cli:main"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "numpy>=2.0",
        "scipy>=1.13",
        "safetensors>=0.5",
        "pyyaml>=6.0",
        "tqdm>=4.66",
        "matplotlib>=3.9",
        "pillow>=10.3",
        "scikit-learn>=1.5",
        "tensorboard>=2.17",
        "torchdiffeq>=0.2.5",
    ],
    extras_require={
        "fid": ["torch-fidelity==0.4.*", "torchvision"],
        "kernels": ["triton>=3.6,<3.8"],
        "quack": ["quack-kernels[cu13]==0.6.*"],  # model.mlp=quack; its interface changes with its versions
        "deepspeed": ["deepspeed>=0.19.7,<0.20"],
        "dali": ["nvidia-dali-cuda130==2.4.*"],
        "imagenet": ["diffusers", "timm", "torchvision"],
        "wandb": ["wandb"],
        "dev": ["setuptools>=77", "pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "types-PyYAML", "torchao"],
        # what `make test` uses beside dev
        "all": ["fastasync[fid,kernels,deepspeed,dali,imagenet]"],
    },
)
