# KubeAI's image: `kubeai serve`, `kubeai load` (also as `load`), `kubeai mock-engine`.
#
#     docker build -t kubeai .
#
# BASE may be another Debian with Python 3.11 or later, or this one pinned by digest.
ARG BASE=debian:trixie-slim

FROM ${BASE} AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        ca-certificates gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt ./
RUN python3 -m venv /build \
    && /build/bin/pip install --no-cache-dir -c constraints.txt setuptools cython wheel
COPY pyproject.toml setup.py README.md LICENSE ./
COPY kubeai kubeai
RUN CFLAGS=-g0 /build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation -w /wheels .
# Without pip. Byte code is compiled here, because the root file system may be read-only later.
RUN python3 -m venv --without-pip /opt/kubeai \
    && /build/bin/pip --python /opt/kubeai/bin/python install --no-cache-dir --no-compile \
        --only-binary :all: -c constraints.txt "$(echo /wheels/kubeai_gateway-*.whl)[load,otel]" \
    && /opt/kubeai/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/kubeai/lib

FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/kubeai /opt/kubeai
RUN printf '#!/bin/sh\nexec kubeai load "$@"\n' >/usr/local/bin/load \
    && chmod 755 /usr/local/bin/load
# The user has no home directory; some libraries fail if HOME is not set.
ENV HOME=/nonexistent \
    PATH=/opt/kubeai/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 65532:65532
EXPOSE 8000 8080 8081
ENTRYPOINT ["kubeai"]
CMD ["serve"]
