"""Fetches packages by name and version from PyPI and npm and unpacks them. Used by the scripts beside it.
Nothing that is fetched is run; the archives are only read."""

import subprocess
import tarfile
import zipfile
from pathlib import Path


def pypi(work: Path, package: str, version: str) -> Path:
    """Folder with the contents of a wheel. Needs pip."""
    out = work / package
    if not out.exists():
        wheels = work / "wheels"
        run(["pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(wheels), f"{package}=={version}"])
        [wheel] = wheels.glob(f"{package}-*.whl")
        zipfile.ZipFile(wheel).extractall(out)
    return out


def npm(work: Path, package: str, version: str) -> Path:
    """Folder with the contents of an npm package. Needs npm."""
    out = work / package
    if not out.exists():
        run(["npm", "pack", "--silent", f"{package}@{version}"], cwd=work)
        tarfile.open(work / f"{package}-{version}.tgz").extractall(out, filter="data")
    return out / "package"


def run(command: list[str], cwd: Path | None = None) -> None:
    print("+", " ".join(command), flush=True)
    subprocess.run(command, check=True, cwd=cwd, stdout=subprocess.DEVNULL)
