"""Writes empty stand-ins for the CUDA libraries that PyTorch's own libraries name but a CPU run never calls.

    cuda_stubs.py SITE_PACKAGES

The loader refuses a library whose named dependencies, or their versioned symbols, are absent. So each missing library is
made with exactly the symbols that are looked for in it, under the versions they are looked for; each returns an error.
"""

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

SYSTEM = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libgcc_s.so.1", "libstdc++.so.6"}
SYSTEM |= {"libgomp.so.1", "ld-linux-x86-64.so.2"}
CUDA = re.compile(r"^(cu[A-Z]|cuda|cudnn|cublas|cufft|curand|cusparse|cusolver|cupti|cuFile|nccl|nvrtc|nvshmem|nvtx|nvJit|__cuda)")


def main() -> None:
    folder = Path(sys.argv[1]) / "torch/lib"
    libraries = sorted(folder.glob("*.so*"))
    present = {library.name for library in libraries} | SYSTEM
    needed, defined, versioned, plain = set(), set(), defaultdict(lambda: defaultdict(set)), set()
    for library in libraries:
        needed |= set(re.findall(r"Shared library: \[(.+?)\]", readelf("-dW", library)))
        owner = version_owners(readelf("-VW", library))
        for line in readelf("--dyn-syms", "-W", library).splitlines():
            part = line.split()
            if len(part) < 8 or not part[0].rstrip(":").isdigit():
                continue
            name, _, version = part[7].partition("@")
            if part[6] != "UND":
                defined.add(name)
            elif version := version.strip("@"):
                versioned[owner.get(version)][version].add(name)
            elif part[4] != "WEAK" and CUDA.match(name):
                plain.add(name)
    for library in sorted(needed - present):
        symbols = set().union(*versioned[library].values(), plain - defined)
        plain.clear()  # unversioned symbols may come from any library: the first has them all
        build(folder / library, symbols, versioned[library])
        print(library, len(symbols), "symbols")


def readelf(*args) -> str:
    return subprocess.run(["readelf", *map(str, args)], capture_output=True, text=True, check=True).stdout


def version_owners(text: str) -> dict[str, str]:
    owners, library = {}, None
    for line in text.splitlines():
        if found := re.search(r"Version: 1\s+File: (\S+)", line):
            library = found[1]
        elif (found := re.search(r"Name: (\S+)\s+Flags", line)) and library:
            owners[found[1]] = library
    return owners


def build(out: Path, symbols: set[str], versions: dict[str, set[str]]) -> None:
    with tempfile.TemporaryDirectory() as work:
        source, script = Path(work) / "stub.c", Path(work) / "stub.map"
        source.write_text("".join(f"long {name}(void) {{ return 999; }}\n" for name in sorted(symbols)) or "int unused;\n")
        script.write_text("".join(f"{v} {{ global: {'; '.join(sorted(names))}; }};\n" for v, names in versions.items()))
        command = ["gcc", "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{out.name}", "-o", str(out), str(source)]
        subprocess.run(command + ([f"-Wl,--version-script,{script}"] if versions else []), check=True)


if __name__ == "__main__":
    main()
