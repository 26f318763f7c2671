#!/usr/bin/env bash
# Builds the container image with a real dockerd, and trains through a coordinator and two nodes in three containers on a private network.
# Needs root and the binary (STOKE_BIN, default target/release/stoke). No registry: the base is a Debian 12 made by mmdebstrap, once, in the cache.
set -euo pipefail
# shellcheck source=tests/deploy/common.sh
. "$(dirname "$0")/common.sh"

# shellcheck source=tests/deploy/docker.sh
. "$(dirname "$0")/docker.sh"
needs_stoke

base=$CACHE/debian-12-curl-jq.tar
base_image "$base" ca-certificates,curl,jq
start_dockerd

say "builds the image"
docker import "$base" stoke-base:12 >/dev/null
context=$work/context
mkdir -p "$context/target/release" "$context/kubernetes"
cp "$STOKE_BIN" "$context/target/release/stoke"
cp -r "$ROOT/kubernetes/image" "$context/kubernetes/"
cp "$ROOT/.dockerignore" "$context/"
docker build --quiet --build-arg BASE=stoke-base:12 --build-arg REVISION="$(git -C "$ROOT" rev-parse HEAD 2>/dev/null || echo none)" \
    --file "$context/kubernetes/image/Dockerfile" --tag stoke:test "$context" >/dev/null
inspect() { docker inspect --format "$1" stoke:test; }
[ "$(inspect '{{.Config.User}}')" = 10001:10001 ] || die "the image runs as root"
inspect '{{json .Config.ExposedPorts}}' | jq --exit-status '."7878/udp" == {}' >/dev/null || die "the image does not expose UDP 7878"
say "the image has $(($(inspect '{{.Size}}') / 1048576)) MiB, of which the binary $(($(stat -c %s "$STOKE_BIN") / 1048576))"

say "starts a coordinator and two nodes: no root, no capabilities, read-only root file system"
docker network create --internal stoke >/dev/null
docker volume create stoke-checkpoints >/dev/null
docker run --rm --user 0 --network none --entrypoint chown --volume stoke-checkpoints:/checkpoints stoke:test 10001:10001 /checkpoints
start() { # NAME [OPTIONS of docker run] -- COMMAND
    local name=$1 options=() container
    shift
    while [ "$1" != -- ]; do options+=("$1"); shift; done
    shift
    container=$(docker run --detach --name "$name" --hostname "$name" --network stoke --read-only --cap-drop ALL --security-opt no-new-privileges \
        --tmpfs /tmp --tmpfs /run/join:uid=10001,gid=10001,mode=0700 --volume "$name:/var/lib/stoke" --volume stoke-checkpoints:/checkpoints \
        --volume "$ROOT/jobs:/jobs:ro" "${options[@]}" stoke:test "$@")
    containers+=("$container")
}
healthy() { [ "$(docker inspect --format '{{.State.Health.Status}}' "$1")" = healthy ]; }
start coordinator -- coordinator --dir /var/lib/stoke --advertise coordinator:7878 --metrics 127.0.0.1:9090 --checkpoints file:///checkpoints
until_true 60 "the coordinator is healthy" healthy coordinator
stoke() { docker exec --env STOKE_CLUSTER=/var/lib/stoke coordinator stoke "$@"; }

for node in node-a node-b; do
    # Started before its token is there, as a pod is.
    start "$node" --shm-size 256m --entrypoint stoke-join -- \
        /run/join/token /var/lib/stoke/node --coordinator coordinator:7878 --cpus 1 --memory 2GiB --label "name=$node"
    stoke token create --role node --ttl 10m 2>/dev/null | docker exec --interactive "$node" sh -c 'umask 077; cat >/run/join/token'
done
two_up() { [ "$(stoke --json nodes | jq '[.nodes[] | select(.state == "up")] | length')" = 2 ]; }
until_true 60 "two nodes are up" two_up
until_true 60 "a node is healthy" healthy node-a

say "trains digits on both nodes"
result=$(stoke --json submit /jobs/specs/digits.toml --ranks 2 --set train.steps=60 --set checkpoint.every=20 --wait | tail -n 400)
first=$(grep -o '"weights_blake3": *"[0-9a-f]*"' <<<"$result" | tail -n 1)
[ -n "$first" ] || die "the job left no weights: $result"
stoke checkpoint verify job-1 >/dev/null

say "drains a node as a pod's end does: its preStop command waits for the ranks, and they move to the other node"
job=$(stoke --json submit /jobs/specs/digits.toml --ranks 1 --set train.steps=2000 | jq --raw-output .job)
holder() { stoke --json nodes | jq --raw-output --exit-status '.nodes[] | select(.ranks != []).name'; }
until_true 60 "the job has a rank" holder
from=$(holder)
docker exec "$from" stoke-ranks-gone 1 2>&1 | says "ranks still run" || die "stoke-ranks-gone sees no rank where one runs"
stoke drain "$from" --deadline 60s >/dev/null
docker exec "$from" stoke-ranks-gone 30 2>&1 | { ! grep .; } || die "ranks are left on a node that was drained"
[ "$(holder)" != "$from" ] || die "the rank is where it was"
stoke cancel "$job" >/dev/null
stoke drain "$from" --undo >/dev/null

say "stops a node (SIGTERM), and starts it again without a token: its identity is in its volume"
docker stop --time 30 node-b >/dev/null
[ "$(docker inspect --format '{{.State.ExitCode}}' node-b)" = 0 ] || die "the agent did not end in order"
docker start node-b >/dev/null
until_true 60 "node-b is back" two_up
[ "$(stoke --json nodes | jq '.nodes | length')" = 2 ] || die "the node came back as another one"
second=$(stoke --json submit /jobs/specs/digits.toml --ranks 2 --set train.steps=60 --set checkpoint.every=20 --wait |
    grep -o '"weights_blake3": *"[0-9a-f]*"' | tail -n 1)
[ "$first" = "$second" ] || die "two runs differ: $first and $second"
docker stop --time 30 coordinator >/dev/null
[ "$(docker inspect --format '{{.State.ExitCode}}' coordinator)" = 0 ] || die "the coordinator did not end in order"
say "both jobs ended with $first"
