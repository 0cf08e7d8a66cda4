#!/usr/bin/env bash
# Runs a command with podman at hand on a Debian machine that has no container engine and reaches no image registry, such as
# a CI machine: installs podman from Debian's packages where it is missing, settles what it takes from systemd elsewhere, and
# makes a base image with Debian's Python. As root.
#
#   docker/without-engine.sh podman build --isolation chroot --network host ... ; docker/without-engine.sh podman ps
#
# BASE_IMAGE (default localhost/base-python:3.13) is made where it is missing and its name begins with localhost/.
# Where it cannot be done, it says why and runs the command all the same: tests of containers are then skipped.
set -euo pipefail

export BASE_IMAGE=${BASE_IMAGE:-localhost/base-python:3.13}
packages=(podman runc netavark aardvark-dns iptables catatonit mmdebstrap)

loud() {
    printf '\n=== NO CONTAINERS HERE: %s\n\n' "$1" >&2
}

install_podman() {
    # one by one: `command -v` is content with the first it finds
    command -v podman > /dev/null && command -v runc > /dev/null && command -v mmdebstrap > /dev/null \
        && [[ -x /usr/lib/podman/netavark ]] && return
    command -v apt-get > /dev/null || { loud "neither podman nor apt-get"; return 1; }
    printf 'without-engine: installing %s\n' "${packages[*]}" >&2
    local get=(timeout 300 apt-get -qq -o DPkg::Lock::Timeout=120)
    "${get[@]}" update >&2 || true
    DEBIAN_FRONTEND=noninteractive "${get[@]}" install -y --no-install-recommends "${packages[@]}" >&2 \
        || { loud "apt-get could not install ${packages[*]}"; return 1; }
}

# The bridge of a network has the lowest hardware address of its ports, so another one when containers start or end, and
# netavark before 1.9 does not settle it: whoever remembers the old one gets no answer from the bridge, which tells names
# there, for up to a minute. So let interfaces that are made from now on say when their address changes.
announce_addresses() {
    local switch=/proc/sys/net/ipv4/conf/default/arp_notify
    { echo 1 > "$switch"; } 2> /dev/null \
        || printf 'without-engine: %s cannot be set: names may be unknown to containers for a minute\n' "$switch" >&2
}

# No systemd: cgroups and events by files. The limits are below those of machines that are containers themselves. What tells
# names here (aardvark-dns 1.4) loses what it is asked while it reads that a container has started or ended: ask again soon.
configure() {
    [[ -z ${CONTAINERS_CONF:-} ]] || return 0
    export CONTAINERS_CONF=/var/tmp/armillary-containers.conf
    cat > "$CONTAINERS_CONF.$$" << 'CONF'
[containers]
default_ulimits = ["nofile=8192:8192", "nproc=4096:4096"]
dns_options = ["timeout:1", "attempts:5"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
CONF
    mv "$CONTAINERS_CONF.$$" "$CONTAINERS_CONF"
}

make_base() {
    [[ $BASE_IMAGE == localhost/* ]] || return 0
    podman image exists "$BASE_IMAGE" && return
    printf 'without-engine: making %s\n' "$BASE_IMAGE" >&2
    local folder skip=() path authorities=/etc/ssl/certs/ca-certificates.crt
    folder=$(mktemp -d)
    for path in /usr/share/{man,doc,locale,info}; do
        skip+=(--dpkgopt="path-exclude=$path/*")
    done
    # the certificate authorities of this machine: it may reach packages through one of its own
    [[ ! -e $authorities ]] || skip+=(--customize-hook="upload $authorities $authorities")
    timeout 300 mmdebstrap -q --variant=minbase --include=python3,python3-venv,ca-certificates "${skip[@]}" \
        trixie "$folder/base.tar" >&2 \
        && podman import -q --change 'CMD ["python3"]' "$folder/base.tar" "$BASE_IMAGE" > /dev/null \
        || { rm -r "$folder"; loud "the base image cannot be made"; return 1; }
    rm -r "$folder"
}

if ((EUID != 0)); then
    loud "that needs root"
else
    install_podman && announce_addresses && configure && make_base || true
fi
exec "$@"
