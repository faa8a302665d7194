#!/usr/bin/env bash
# Install message brokers for tests/brokers, and print the folder for the environment variable BROKERS:
#
#     BROKERS=$(tests/brokers/build.sh [NAME …])
#
# Without a NAME, all are installed. The folder is outside the tree, in the user's cache, and has a
# subfolder for each broker. It is named after the versions, so it can be cached between runs. Nothing
# is installed in the system.
set -euo pipefail
cd "$(dirname "$0")"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/kubeai-brokers

retry() { # a download may fail once
    "$@" || { sleep 5 && "$@"; } || { sleep 30 && "$@"; }
}

# Each build_NAME installs into the empty folder $1. Its text, the files in the folder NAME here, if
# any, and the release of the operating system determine the version.

build_nats() {
    (cd nats && retry go build -ldflags "-s -w" -o "$1/nats-server" github.com/nats-io/nats-server/v2)
}

# RabbitMQ and Erlang from Debian, unpacked, so that no service is started and no user is created.
build_rabbitmq() {
    (
        mkdir "$1/packages"
        cd "$1/packages"
        download() {
            apt-get -qq download rabbitmq-server $(apt-cache depends --recurse --no-recommends \
                --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances \
                rabbitmq-server | grep -oE '^erlang-[a-z0-9-]+' | sort -u)
        }
        if ! download; then # the system's package lists are missing or old, and stay as they are
            mkdir -p lists/partial cache/archives/partial
            printf '%s "%s";\n' Dir::State::Lists "$PWD/lists" Dir::Cache "$PWD/cache" \
                APT::Sandbox::User "$(id -un)" >apt.conf
            export APT_CONFIG=$PWD/apt.conf
            apt-get -qq update
            download
        fi
        for package in *.deb; do dpkg-deb -x "$package" "$1"; done
        rm -r "$1/packages"
    )
    sed -i 's|ROOTDIR=/usr/lib/erlang|ROOTDIR=$(realpath "$(dirname "$prog")/..")|' \
        "$1/usr/lib/erlang/bin/erl"
}

# Needs a JDK and Maven. The broker's logs are discarded: no logging backend is among its jars.
build_kafka() {
    retry mvn -q -B -f kafka/pom.xml dependency:copy-dependencies "-DoutputDirectory=$1/lib"
}

# Google's fake of Pub/Sub, which its client library for Go is tested with.
build_pstest() {
    (cd pstest && retry go build -ldflags "-s -w" -o "$1/pstest" .)
}

# Apache Qpid Proton for Python, compiled, for the peer that behaves as Service Bus does.
build_servicebus() {
    ../../.venv/bin/pip --disable-pip-version-check install -q --no-deps --target "$1" \
        -r servicebus/requirements.txt
}

versions() { # the version of each NAME, a line each: NAME-digest
    local name
    for name; do
        echo "$name-$({
            declare -f "build_$name"
            git ls-files -z -co --exclude-standard "$name" | xargs -0r cat
            grep VERSION_ID /etc/os-release
        } | sha256sum | cut -c1-16)"
    done
}

all=$(declare -F | sed -n 's/^declare -f build_//p')
folder=$cache/$(versions $all | sha256sum | cut -c1-16)
mkdir -p "$folder"
exec 9>"$cache/lock" # two runs at once build once
flock 9
for version in $(versions ${*:-$all}); do
    name=${version%-*}
    if [[ ! -d "$cache/$version" ]]; then
        rm -rf "$cache/$name.new" && mkdir "$cache/$name.new"
        "build_$name" "$cache/$name.new" >&2
        mv "$cache/$name.new" "$cache/$version"
    fi
    ln -sfnT "../$version" "$folder/$name"
done
echo "$folder"
