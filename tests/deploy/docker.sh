# Sourced after common.sh: a dockerd of the script's own, in a network namespace of its own: its bridges, iptables rules and sysctls are gone with it, and the host keeps
# what it had. Sets `work` (a folder), `space` (the namespace), `containers`; defines docker(). Owns no test.
# shellcheck shell=bash
[ "$(id -u)" = 0 ] || die "dockerd needs root"
apt_install dockerd docker.io
apt_install mmdebstrap mmdebstrap
apt_install iptables iptables
DOCKER=/usr/bin/docker

name=$(basename "$0" .sh)
work=$(mktemp -d "/tmp/stoke-$name.XXXXXX")
space=stoke-$name-$$
dockerd_pid=
containers=()
clean_up() {
    local status=$?
    if [ "$status" != 0 ] && [ -S "$work/d.sock" ]; then
        for container in "${containers[@]}"; do
            echo "-- the end of the log of $(docker inspect --format '{{.Name}}' "$container")" >&2
            docker logs --tail 15 "$container" >&2 || true
        done
        tail -n 5 "$work/dockerd.log" >&2 || true
    fi
    [ ${#containers[@]} = 0 ] || docker rm --force --volumes "${containers[@]}" >/dev/null || true
    [ -z "$dockerd_pid" ] || end_process "$dockerd_pid"
    ip netns delete "$space" 2>/dev/null || true
    # Mounts that a dockerd which was killed has left.
    grep -o " $work/[^ ]*" /proc/mounts | sort -r | xargs -r umount -l || true
    rm -rf "$work"
    exit "$status"
}
trap clean_up EXIT
docker() { "$DOCKER" --host "unix://$work/d.sock" "$@"; }

# base_image FILE PACKAGES: a Debian 12 made by mmdebstrap, once, in the cache: no registry is needed.
base_image() {
    [ -s "$1" ] && return 0
    say "makes the base image $(basename "$1") with mmdebstrap (two minutes, once)"
    mkdir -p "$CACHE"
    mmdebstrap --quiet --variant=minbase --include="$2" bookworm "${1%.tar}.part.tar"
    mv "${1%.tar}.part.tar" "$1"
}

start_dockerd() {
    say "starts dockerd in the network namespace $space"
    ip netns add "$space"
    # nsenter, not `ip netns exec`: that one mounts another /sys, without the control groups.
    nsenter --net="/run/netns/$space" ip link set lo up
    nsenter --net="/run/netns/$space" dockerd --data-root "$work/data" --exec-root "$work/exec" --host "unix://$work/d.sock" --pidfile "$work/d.pid" \
        >"$work/dockerd.log" 2>&1 &
    dockerd_pid=$!
    until_true 60 "dockerd answers" docker info
}
