#!/usr/bin/env bash
# Print the folder that holds etcd, kube-apiserver and kubectl, and build them there first if need
# be. The folder is outside the tree and named after what goes into it, so that it can be kept
# between runs. Where KUBEBUILDER_ASSETS is set, it is that folder, and nothing is built.
set -euo pipefail
cd "$(dirname "$0")"

binaries=(etcd kube-apiserver kubectl)
complete() {
    local name
    for name in "${binaries[@]}"; do [[ -x "$1/$name" ]] || return 1; done
}

if [[ -n "${KUBEBUILDER_ASSETS:-}" ]]; then
    complete "$KUBEBUILDER_ASSETS" || {
        echo "KUBEBUILDER_ASSETS=$KUBEBUILDER_ASSETS lacks one of: ${binaries[*]}" >&2
        exit 1
    }
    echo "$KUBEBUILDER_ASSETS"
    exit
fi

cache=${XDG_CACHE_HOME:-$HOME/.cache}/kubeai-cluster
folder=$cache/$(cat go.mod go.sum | sha256sum | cut -c1-16)
mkdir -p "$cache"
exec 9>"$cache/lock" # two runs at once build once
flock 9
if ! complete "$folder"; then
    version=$(sed -n 's|^.*k8s.io/kubernetes \(v[0-9.]*\).*|\1|p' go.mod | head -1)
    IFS=. read -r major minor _ <<<"${version#v}"
    stamp=k8s.io/component-base/version
    flags="-s -w -X $stamp.gitVersion=$version -X $stamp.gitMajor=$major -X $stamp.gitMinor=$minor"
    partial=$folder.new
    rm -rf "$partial" && mkdir "$partial"
    {
        go build -ldflags "-s -w" -o "$partial/etcd" go.etcd.io/etcd/server/v3
        go build -ldflags "$flags" -o "$partial/kube-apiserver" k8s.io/kubernetes/cmd/kube-apiserver
        go build -ldflags "$flags" -o "$partial/kubectl" k8s.io/kubernetes/cmd/kubectl
    } >&2
    mv "$partial" "$folder"
fi
echo "$folder"
