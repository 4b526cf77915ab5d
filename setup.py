"""Builds `elastic_ep.fused`, for two generations of processors. Everything else is in pyproject.toml."""

import hashlib
from pathlib import Path

from setuptools import Extension, setup

FOLDER = Path("src/elastic_ep/fused")
SOURCES = sorted([*FOLDER.glob("*.h"), *FOLDER.glob("*.cpp")])
DIGEST = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES)).hexdigest()
BUILDS = {"_v3": "x86-64-v3", "_v4": "x86-64-v4"}

setup(
    ext_modules=[
        Extension(
            f"elastic_ep.fused.{name}",
            [str(FOLDER / "engine.cpp")],
            depends=[*map(str, SOURCES), "setup.py"],
            language="c++",
            define_macros=[("SOURCES", f'"{DIGEST}"')],
            # -w: the compiler's own headers for AVX-512 make it complain.
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-w",
                f"-march={march}",
            ],
            # Without a compiler, or on another processor, ranks compute in plain torch.
            optional=True,
        )
        for name, march in BUILDS.items()
    ]
)
