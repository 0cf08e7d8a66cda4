#!/usr/bin/env bash
# Builds the image with podman: docker/build.sh [TAG] [more flags of podman build, such as --build-arg EXTRAS=fsspec].
# What pip is told by the environment goes along: an index by its variables, a whole pip.conf by PIP_CONFIG_FILE, as a
# secret, which leaves no trace in any layer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tag=${1:-localhost/armillary:dev}
flags=(--isolation chroot --network host --format docker --tag "$tag" --file docker/Dockerfile)
for name in BASE_IMAGE PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_TRUSTED_HOST; do
    [[ -z ${!name:-} ]] || flags+=(--build-arg "$name=${!name}")
done
[[ ! -f ${PIP_CONFIG_FILE:-} ]] || flags+=(--secret "id=pip,src=$PIP_CONFIG_FILE")
podman build "${flags[@]}" "${@:2}" .
podman image inspect --format "$tag: {{.Size}} bytes" "$tag"
