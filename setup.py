"""Builds the package `bandcrop` from csrc/ with the codec libraries that this machine has."""

import os
import tempfile
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# macro, header, library, a call that proves both, Debian package
CODECS = [
    ("LIBDEFLATE", "libdeflate.h", "deflate", "libdeflate_alloc_decompressor()", "libdeflate-dev"),
    ("ZLIB", "zlib.h", "z", "zlibVersion()", "zlib1g-dev"),
    ("ZSTD", "zstd.h", "zstd", "ZSTD_createDCtx()", "libzstd-dev"),
]


class BuildExtension(build_ext):
    """Looks for the codec libraries first and says in one line what it found."""

    def links(self, header: str, library: str, call: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "try.cpp")
            source.write_text(f"#include <{header}>\nint main() {{ return {call} == nullptr; }}\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder)
                self.compiler.link_executable(
                    objects, str(Path(folder, "try")), libraries=[library]
                )
            except Exception:  # whatever the compiler's reason, the library cannot be used
                return False
        return True

    def build_extensions(self) -> None:
        extension = self.extensions[0]
        found, missing = [], []
        for macro, header, library, call, package in CODECS:
            if macro == "ZLIB" and "LIBDEFLATE" in found:
                continue
            if self.links(header, library, call):
                found.append(macro)
                extension.define_macros.append((f"BANDCROP_{macro}", None))
                extension.libraries.append(library)
            else:
                missing.append(f"{library} (Debian package {package})")
        line = f"bandcrop: codecs none, packbits, lzw, {', '.join(found).lower()}"
        print(line + (f"; not found: {', '.join(missing)}" if missing else ""), flush=True)
        super().build_extensions()


ROOMS = ["tiff", "decode", "resample", "pool", "bandcrop"]
flags = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wconversion", "-pthread"]
flags.append("-g0")  # Python's own flags ask for symbols: nine tenths of the file
flags.append("-Wno-psabi")  # how vectors are passed does not matter where every call is inlined
flags.append("-fno-trapping-math")  # changes no result; without it the pixel loops stay scalar
if os.environ.get("CI"):
    flags.append("-Werror")
links = ["-pthread"]
if sanitizers := os.environ.get("BANDCROP_SANITIZE"):  # e.g. address,undefined
    flags += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    flags += ["-fno-omit-frame-pointer", "-g"]
    links += [f"-fsanitize={sanitizers}"]

setup(
    ext_modules=[
        Extension(
            "bandcrop._core",
            [f"csrc/{room}.cpp" for room in ROOMS],
            depends=[f"csrc/{room}.h" for room in ROOMS[:-1]],
            extra_compile_args=[*flags, "-isystem", pybind11.get_include()],
            extra_link_args=links,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    packages=["bandcrop"],
    package_dir={"bandcrop": "csrc/bandcrop"},
    package_data={"bandcrop": ["*.pyi", "py.typed"]},
)
