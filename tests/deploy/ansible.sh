#!/usr/bin/env bash
# Brings a cluster up with the playbooks on three hosts with systemd and sshd, trains on it, upgrades it under a running job, and takes it off again.
# Needs root, cargo and the binary (STOKE_BIN, default target/release/stoke). The hosts are containers FROM nothing but Debian packages, on a private network; Ansible reaches
# them by ssh. Installs cargo-deb 3.8.0 (crates.io), ansible-core and ansible-lint (PyPI) into the cache, once.
# Roles nvidia and monitoring are linted and no more: the hosts have no GPU, and no Debian mirror to install Prometheus from.
# --fast: without what --lint does. --lint: nothing but ansible-lint, the syntax of the playbooks and the units of the package; no root, binary, cargo or containers are needed,
# and where Ansible cannot be installed it says so and ends well.
set -euo pipefail
# shellcheck source=tests/deploy/common.sh
. "$(dirname "$0")/common.sh"
mode=${1:-}

lint() {
    say "ansible-lint, profile production"
    (cd "$ROOT/ansible" && ansible-lint --offline --profile production)
    say "syntax of the playbooks, with the inventory of the example"
    (cd "$ROOT/ansible" && ansible-playbook --inventory inventories/example --syntax-check site.yml upgrade.yml uninstall.yml >/dev/null)
    if command -v systemd-analyze >/dev/null; then lint_units; else echo "not tested: the units of the package, because systemd-analyze is not installed"; fi
}
lint_units() {
    say "systemd takes the units of the package, and finds them closed"
    local folder unit said found=0
    folder=$(mktemp -d /tmp/stoke-units.XXXXXX)
    for unit in "$ROOT"/packaging/systemd/*.service; do
        # A program that is on this machine.
        sed 's|/usr/bin/stoke|/bin/true|' "$unit" >"$folder/$(basename "$unit")"
    done
    # Of the system's own units, which are found too, others speak. DelegateSubgroup= is for systemd 254 and newer.
    systemd-analyze verify --man=no "$folder"/*.service 2>&1 | grep "$folder" | grep -v "'DelegateSubgroup'" && found=1
    for unit in "$folder"/*.service; do
        said=$(systemd-analyze security --offline=yes --no-pager --threshold=30 "$unit" 2>&1) || { printf '%s\n' "$said"; found=1; }
        sed -n 's/^→ //p' <<<"$said"
    done
    rm -rf "$folder"
    [ "$found" = 0 ] || die "systemd finds fault with the units"
}

ansible_env() { python_env deploy-ansible "${PYTHON:-python3}" ansible-core==2.19.14 ansible-lint==26.10.1; }
if [ "$mode" = --lint ]; then
    if ! venv=$(PIP_RETRIES=1 ansible_env); then
        echo "not tested: the playbooks, because Ansible cannot be installed (python3 with venv and pip, and PyPI, are needed)"
        exit 0
    fi
    export PATH=$venv/bin:$PATH
    lint
    exit 0
fi

# shellcheck source=tests/deploy/docker.sh
. "$(dirname "$0")/docker.sh"
needs_stoke
apt_install ssh openssh-client
apt_install jq jq
venv=$(ansible_env)
export PATH=$venv/bin:$PATH
cargo_deb=$CACHE/cargo-deb-3.8.0
if ! [ -x "$cargo_deb/bin/cargo-deb" ]; then
    say "installs cargo-deb 3.8.0 into $cargo_deb (some minutes, once)"
    env -u CARGO_BUILD_BUILD_DIR cargo install cargo-deb --locked --version 3.8.0 --root "$cargo_deb" --quiet
fi
export PATH=$cargo_deb/bin:$PATH

cd "$ROOT/ansible"
[ "$mode" = --fast ] || lint

say "makes the packages of two versions"
for version in 0.1.0 0.1.0+next; do
    "$ROOT/packaging/deb.sh" "$version" >/dev/null
    cp "$ROOT/target/debian/stoke.deb" "$work/stoke_$version.deb"
done
contents=$(dpkg-deb --contents "$work/stoke_0.1.0.deb")
for file in ./usr/bin/stoke ./usr/lib/systemd/system/stoke-node.service ./usr/share/man/man1/stoke-node-remove.1.gz \
    ./usr/share/bash-completion/completions/stoke ./usr/lib/sysusers.d/stoke.conf; do
    grep -q " $file\$" <<<"$contents" || die "the package has no $file"
done

base=$CACHE/debian-12-hosts.tar
base_image "$base" systemd,systemd-sysv,dbus,openssh-server,python3,python3-apt,sudo,ca-certificates,iproute2,nftables,procps,adduser
start_dockerd
docker import "$base" stoke-host:12 >/dev/null
docker network create --internal --subnet 10.123.0.0/24 lab >/dev/null
docker volume create shared >/dev/null
ssh-keygen -q -t ed25519 -N '' -f "$work/key"

say "starts three hosts"
hosts=(head gpu1 gpu2)
for index in 0 1 2; do
    host=${hosts[$index]}
    containers+=("$(docker run --detach --name "$host" --hostname "$host" --network lab --ip "10.123.0.$((index + 10))" --cap-add SYS_ADMIN --cap-add NET_ADMIN --cap-add SYS_PTRACE \
        --security-opt seccomp=unconfined --security-opt apparmor=unconfined --security-opt systempaths=unconfined --cgroupns=host --shm-size 256m \
        --tmpfs /run:exec --tmpfs /run/lock --tmpfs /tmp:exec --volume /sys/fs/cgroup:/sys/fs/cgroup:rw --volume shared:/mnt/stoke --volume "$ROOT/jobs:/jobs:ro" \
        --env container=docker stoke-host:12 /sbin/init)")
done
on() { # HOST COMMAND...
    docker exec --interactive "$@"
}
booted() { on "$1" systemctl is-active ssh.service; }
: >"$work/known_hosts"
on head install -d -m 1777 /mnt/stoke/checkpoints
for index in 0 1 2; do
    host=${hosts[$index]}
    until_true 90 "$host is up" booted "$host"
    on "$host" sh -c 'install -d -m 0700 /root/.ssh && cat >/root/.ssh/authorized_keys' <"$work/key.pub"
    echo "10.123.0.$((index + 10)) $(on "$host" cat /etc/ssh/ssh_host_ed25519_key.pub)" >>"$work/known_hosts"
done

# The head is a node as well.
cat >"$work/hosts.yml" <<YAML
all:
  vars:
    ansible_user: root
    ansible_python_interpreter: /usr/bin/python3
    ansible_ssh_private_key_file: $work/key
    ansible_ssh_common_args: -o UserKnownHostsFile=$work/known_hosts -o StrictHostKeyChecking=yes -o ControlPath=$work/%C
    stoke_deb: $work/stoke_0.1.0.deb
    stoke_checkpoints: file:///mnt/stoke/checkpoints
    stoke_user_cidrs: [10.123.0.1/32]
    # Containers share their host's clock, and cannot keep it.
    stoke_clock_not_kept: warn
    stoke_node_settings: { cpus: 1, memory: 2GiB }
  children:
    coordinator:
      hosts:
        head: { ansible_host: 10.123.0.10 }
    nodes:
      hosts:
        head:
        gpu1: { ansible_host: 10.123.0.11, stoke_labels: { rack: a } }
        gpu2: { ansible_host: 10.123.0.12, stoke_labels: { rack: b } }
YAML
play() { # LOG PLAYBOOK [OPTIONS]
    local log=$work/$1.log
    shift
    nsenter --net="/run/netns/$space" ansible-playbook --inventory "$work/hosts.yml" "$@" >"$log" 2>&1 </dev/null || {
        grep -vE '^\s*$|^(ok|skipping|included):' "$log" | tail -n 60 >&2
        die "ansible-playbook $*"
    }
}
files() { # HOST: what a cluster may leave there
    on "$1" find / -xdev \( -path /proc -o -path /sys -o -path /run -o -path /tmp -o -path /var/tmp -o -path /var/log -o -path /root -o -path /dev -o -path /var/lib/dpkg \
        -o -path /var/lib/apt -o -path /var/cache/apt -o -path /var/lib/systemd -o -path /mnt -o -path /jobs -o -path '*/__pycache__' -o -name '*-' \
        -o -name '.pwd.lock' -o -name '.updated' -o -path /var/cache/ldconfig \) -prune -o -print
    on "$1" sh -c "cut -d: -f1 /etc/passwd /etc/group; ls -A /dev/shm /run/systemd/system; nft list tables; ps -eo user,comm | grep ^stoke || true"
}
for host in "${hosts[@]}"; do files "$host" | sort >"$work/$host.before"; done

say "site.yml"
play first site.yml -vvv
if grep -lE 'stoke1\.[A-Za-z0-9]' "$work"/*.log; then die "a join token stands in the output of Ansible"; fi
for host in "${hosts[@]}"; do
    if on "$host" sh -c 'journalctl --no-pager | grep -E "stoke1\.[A-Za-z0-9]"; grep -rlE "stoke1\.[A-Za-z0-9]{20}" /root /tmp /var/tmp /etc /var/lib /var/cache /run 2>/dev/null' | grep .; then
        die "a join token was left on $host"
    fi
done

say "site.yml again: nothing changes"
play second site.yml
grep -E '^(head|gpu1|gpu2) .*changed=' "$work/second.log" | grep -v 'changed=0 ' && die "a second run changes something"

say "the services as systemd sees them"
property() { on "$1" systemctl show --property "$3" --value "$2" | tr -d '\r\n'; }
for place in head:stoke-coordinator head:stoke-node gpu1:stoke-node gpu2:stoke-node; do
    host=${place%%:*} unit=${place##*:}
    [ "$(property "$host" "$unit" Type)/$(property "$host" "$unit" ActiveState)/$(property "$host" "$unit" SubState)" = notify/active/running ] || die "$unit is not active on $host"
    [ "$(property "$host" "$unit" WatchdogUSec)" = 30s ] || die "$unit on $host has no watchdog"
done
for unit in stoke-coordinator stoke-node; do
    score=$(on head systemd-analyze security --no-pager "$unit.service" | sed -n 's/.*Overall exposure level for .*: \([0-9.]*\) .*/\1/p')
    say "$unit: systemd-analyze security $score"
    jq --null-input --exit-status --argjson score "$score" '$score < 3' >/dev/null || die "the exposure of $unit is $score"
done
on gpu1 nft list table inet stoke | says 'policy drop' || die "gpu1 has no firewall"
[ "$(on gpu1 cat /proc/sys/net/ipv4/ip_local_port_range | tr '\t' ' ')" = "40000 40999" ] || die "gpu1 takes other ports"
[ "$(on head stat -c '%U %a' /var/lib/stoke)/$(on gpu1 stat -c '%U %a' /var/lib/stoke-node)" = "stoke 700/stoke-node 700" ] || die "others can read the folders"

stoke() { on head runuser -u stoke -- stoke --cluster /var/lib/stoke "$@"; }
weights() { grep -o '"weights_blake3": *"[0-9a-f]*"' | tail -n 1; }
say "the quick-start job across two of the nodes"
first=$(stoke --json submit /jobs/specs/domains.toml --ranks 2 --wait | weights)
[ -n "$first" ] || die "the quick-start job left no weights"
stoke --json jobs | jq --exit-status '[.jobs[0].placement[].node] | unique | length == 2' >/dev/null || die "the job was not on two nodes"
stoke checkpoint verify job-1 >/dev/null

say "a command across two nodes: what the firewall lets through"
cat >"$work/pair.toml" <<'TOML'
name = "pair"
[exec]
command = ["python3", "-c", '''
import os, socket
address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
if os.environ["RANK"] == "0":
    listener = socket.create_server(("0.0.0.0", address[1]))
    peer, _ = listener.accept()
    print("heard", peer.recv(5))
else:
    while True:
        try:
            socket.create_connection(address, timeout=5).sendall(b"hello")
            break
        except ConnectionRefusedError:
            pass
''']
[resources]
ranks = 2
cpus = 1
memory = "256MiB"
TOML
on head sh -c 'cat >/mnt/stoke/pair.toml && chmod 644 /mnt/stoke/pair.toml' <"$work/pair.toml"
timeout 120 "$DOCKER" --host "unix://$work/d.sock" exec head runuser -u stoke -- stoke --cluster /var/lib/stoke submit /mnt/stoke/pair.toml --wait >/dev/null || die "two commands do not reach each other"

say "an agent that is killed: systemd starts another, and the ranks step on"
steps=${STEPS:-3000}
submit() { stoke --json submit /jobs/specs/digits.toml --ranks 2 --set "train.steps=$1" --set checkpoint.every=500 | jq --raw-output .job; }
job_of() { stoke --json jobs --all | jq --arg job "$1" '.jobs[] | select(.job == $job)'; }
is() { [ "$(job_of "$1" | jq --raw-output .state)" = "$2" ]; }
moves_on() { job_of "$1" | jq --exit-status '(.progress.step // 0) > 5'; }
ranks_of() { on "$1" sh -c 'pgrep -u stoke-node -f " worker$"'; }
calm=$(submit "$steps")
until_true 60 "$calm runs" moves_on "$calm"
holder=$(stoke --json nodes | jq --raw-output '[.nodes[] | select(.ranks != [] and .name != "head")][0].name')
ranks=$(ranks_of "$holder")
agent=$(property "$holder" stoke-node MainPID)
on "$holder" systemctl kill --kill-whom=main --signal=KILL stoke-node
another_agent() { [ "$(property "$holder" stoke-node ActiveState)" = active ] && [ "$(property "$holder" stoke-node MainPID)" != "$agent" ]; }
until_true 60 "another agent" another_agent
[ "$(ranks_of "$holder")" = "$ranks" ] || die "the ranks of $holder did not outlive its agent"
until_true 900 "$calm succeeds" is "$calm" succeeded
job_of "$calm" | jq --exit-status '.recoveries == 0' >/dev/null || die "the death of an agent cost a recovery"

say "upgrade.yml under a running job"
sed -i "s|stoke_deb: .*|stoke_deb: $work/stoke_0.1.0+next.deb|" "$work/hosts.yml"
moved=$(submit "$steps")
until_true 60 "$moved runs" moves_on "$moved"
began=$SECONDS
play upgrade upgrade.yml
say "it took $((SECONDS - began)) s"
stoke explain "$moved" | says 'and moves from' || die "$moved met no upgrade: it ended too early, or no rank of it moved; help: STEPS=$((steps * 2))"
for host in "${hosts[@]}"; do
    [ "$(on "$host" dpkg-query --show --showformat '${Version}' stoke)" = 0.1.0+next ] || die "$host was not upgraded"
    on "$host" sh -c 'readlink /proc/$(systemctl show --property MainPID --value stoke-node)/exe' | says '^/usr/bin/stoke$' || die "the old agent runs on $host"
done
on head sh -c 'readlink /proc/$(systemctl show --property MainPID --value stoke-coordinator)/exe' | says '^/usr/bin/stoke$' || die "the old coordinator runs"
stoke --json nodes | jq --exit-status '[.nodes[].state] == ["up", "up", "up"]' >/dev/null || die "a node is not back: $(stoke nodes)"
until_true 900 "$moved succeeds" is "$moved" succeeded
job_of "$moved" | jq --exit-status '.failures == 0' >/dev/null || die "the upgrade counts as a failure"
for job in "$calm" "$moved"; do stoke --json status "$job" | weights; done | sort -u >"$work/weights"
[ "$(wc -l <"$work/weights")" = 1 ] || die "the upgrade changed the weights: $(cat "$work/weights")"
say "$calm, whose agent was killed, and $moved, under which all was replaced, ended with $(cat "$work/weights")"
play upgraded upgrade.yml
grep -E '^(head|gpu1|gpu2) .*changed=' "$work/upgraded.log" | grep -v 'changed=0 ' && die "a second upgrade changes something"

say "a coordinator that is stopped (SIGSTOP) is seen by the watchdog"
frozen=$(property head stoke-coordinator MainPID)
on head kill -STOP "$frozen"
another_coordinator() { [ "$(property head stoke-coordinator ActiveState)" = active ] && [ "$(property head stoke-coordinator MainPID)" != "$frozen" ]; }
until_true 120 "another coordinator" another_coordinator
on head journalctl --no-pager --unit stoke-coordinator | says 'Watchdog timeout' || die "it was not the watchdog"
three_up() { stoke --json nodes | jq --exit-status '[.nodes[].state] == ["up", "up", "up"]'; }
until_true 60 "the nodes are back" three_up

say "a node taken out with --limit"
play leave uninstall.yml --limit gpu2 --extra-vars stoke_confirm=uninstall
stoke --json nodes | jq --exit-status '[.nodes[].name] | sort == ["gpu1", "head"]' >/dev/null || die "gpu2 is still a node: $(stoke nodes)"

say "uninstall.yml"
nsenter --net="/run/netns/$space" ansible-playbook --inventory "$work/hosts.yml" uninstall.yml >"$work/refused.log" 2>&1 </dev/null && die "nothing was asked before it removed a cluster"
play uninstall uninstall.yml --extra-vars stoke_confirm=uninstall
for host in "${hosts[@]}"; do
    files "$host" | sort >"$work/$host.after"
    diff "$work/$host.before" "$work/$host.after" || die "something is left on $host"
done
play uninstalled uninstall.yml --extra-vars stoke_confirm=uninstall
grep -E '^(head|gpu1|gpu2) .*changed=' "$work/uninstalled.log" | grep -v 'changed=0 ' && die "a second run of uninstall.yml changes something"
say "nothing is left"
