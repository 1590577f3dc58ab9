#!/usr/bin/env bash
# Makes a small Debian base for a CPU image from Debian's packages, where no registry can be reached: docker/cpu_base.sh [NAME]
# Needs root, mmdebstrap and buildah (apt-get install mmdebstrap buildah). Then: --build-arg BASE=NAME
set -euo pipefail
name=${1:-localhost/minitron-base:bookworm}
work=$(mktemp -d)
container=
clean_up() {
  rm -rf "$work"
  [ -z "$container" ] || buildah rm "$container" >/dev/null
}
trap clean_up EXIT
# nobody needs the half-made base after a power cut: dpkg need not wait for the disk
mmdebstrap --quiet --variant=minbase --dpkgopt=force-unsafe-io \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/man/*' \
  bookworm "$work/base.tar"
container=$(buildah from scratch)
buildah add --quiet "$container" "$work/base.tar" / >/dev/null
buildah config --cmd bash "$container"
buildah commit --quiet --format docker "$container" "$name" >/dev/null
echo "$name"
