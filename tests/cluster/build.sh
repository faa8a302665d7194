#!/usr/bin/env bash
# Print the directory with etcd, the Kubernetes control plane, kubectl, kwok and helm, after building
# them if needed. The directory is outside the tree and named after the versions, so it can be cached
# between runs. If KUBEBUILDER_ASSETS is set, that directory is printed and nothing is built; it may
# lack the programs that only tests with a whole cluster need.
set -euo pipefail
cd "$(dirname "$0")"

needed=(etcd kube-apiserver kubectl)
binaries=("${needed[@]}" kube-controller-manager kube-scheduler kwok helm)
complete() {
    local folder=$1 name
    shift
    for name; do [[ -x "$folder/$name" ]] || return 1; done
}

if [[ -n "${KUBEBUILDER_ASSETS:-}" ]]; then
    complete "$KUBEBUILDER_ASSETS" "${needed[@]}" || {
        echo "KUBEBUILDER_ASSETS=$KUBEBUILDER_ASSETS lacks one of: ${needed[*]}" >&2
        exit 1
    }
    echo "$KUBEBUILDER_ASSETS"
    exit
fi

retry() { # a download may fail once
    "$@" || { sleep 5 && "$@"; } || { sleep 30 && "$@"; }
}

cache=${XDG_CACHE_HOME:-$HOME/.cache}/kubeai-cluster
folder=$cache/$(cat go.mod go.sum kwok/go.mod kwok/go.sum helm/go.mod helm/go.sum | sha256sum | cut -c1-16)
mkdir -p "$cache"
exec 9>"$cache/lock" # two runs at once build once
flock 9
if ! complete "$folder" "${binaries[@]}"; then
    version=$(sed -n 's|^.*k8s.io/kubernetes \(v[0-9.]*\).*|\1|p' go.mod | head -1)
    IFS=. read -r major minor _ <<<"${version#v}"
    stamp=k8s.io/component-base/version
    flags="-s -w -X $stamp.gitVersion=$version -X $stamp.gitMajor=$major -X $stamp.gitMinor=$minor"
    partial=$folder.new
    rm -rf "$partial" && mkdir "$partial"
    {
        retry go build -ldflags "-s -w" -o "$partial/etcd" go.etcd.io/etcd/server/v3
        for name in kube-apiserver kube-controller-manager kube-scheduler kubectl; do
            retry go build -ldflags "$flags" -o "$partial/$name" "k8s.io/kubernetes/cmd/$name"
        done
        (cd kwok && retry go build -ldflags "-s -w" -o "$partial/kwok" sigs.k8s.io/kwok/cmd/kwok)
        stamp=helm.sh/helm/v3/pkg/chartutil # which Kubernetes it takes for granted
        flags="-s -w -X $stamp.k8sVersionMajor=$major -X $stamp.k8sVersionMinor=$minor"
        (cd helm && retry go build -ldflags "$flags" -o "$partial/helm" helm.sh/helm/v3/cmd/helm)
    } >&2
    mv "$partial" "$folder"
fi
# Not built: the CustomResourceDefinition of LeaderWorkerSet. Without it, tests use one of their own.
if [[ ! -f "$folder/leaderworkersets.yaml" ]]; then
    module=$(cd lws && retry go mod download -json sigs.k8s.io/lws | sed -n 's|^.*"Dir": "\(.*\)".*|\1|p') || true
    install -m 644 "$module/config/crd/bases/leaderworkerset.x-k8s.io_leaderworkersets.yaml" \
        "$folder/leaderworkersets.yaml" || echo "there is no definition of LeaderWorkerSet" >&2
fi
echo "$folder"
