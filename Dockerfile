# KubeAI's image: `kubeai serve`, `kubeai load` (also as `load`), `kubeai mock-engine`.
#
#     docker build --build-arg VERSION=1.2.3 -t kubeai .
#
# The contents are made by release/rootfs.py, as for the image of a release. BASE is what they are
# made in: this Debian, which may be pinned by digest, or another one with Python 3.13.
ARG BASE=debian:trixie-slim

FROM ${BASE} AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        binutils ca-certificates gcc libc6-dev mmdebstrap python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt ./
RUN python3 -m venv /build \
    && /build/bin/pip install --no-cache-dir -c constraints.txt setuptools cython wheel uv
COPY pyproject.toml setup.py README.md LICENSE ./
COPY kubeai kubeai
# The version of KubeAI; the build has no git tag to read it from.
ARG VERSION=
RUN KUBEAI_VERSION="${VERSION}" CFLAGS=-g0 /build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation -w /wheels .
COPY release/__init__.py release/architectures.py release/rootfs.py release/
RUN /build/bin/python -m release.rootfs /image /wheels/kubeai_gateway-*.whl

FROM scratch
COPY --from=build /image/debian /
COPY --from=build /image/packages /
COPY --from=build /image/kubeai /
# The user has no home directory; some libraries fail if HOME is not set.
ENV HOME=/nonexistent \
    PATH=/opt/kubeai/bin:/usr/local/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 65532:65532
EXPOSE 8000 8080 8081
ENTRYPOINT ["/opt/kubeai/bin/kubeai"]
CMD ["serve"]
