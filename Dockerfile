# Build:  docker build -t nodepass .        (podman and buildah: --format docker, for the health check)
# Run:    docker run --rm --read-only -p 10101:10101 -p 8080:8080 -e DATA_PORT=tunnel nodepass "server://:10101/:8080?tls=1"
# More:   docs/containers.md
#
# Any base with Python 3.10 or newer and its venv module.
ARG BASE=python:3.13-slim

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1
RUN python3 -m venv /opt/nodepass
# The dependencies first: this layer is rebuilt only when they change.
COPY contrib/lock /src/contrib/lock
RUN /opt/nodepass/bin/pip install --require-hashes -r /src/contrib/lock/metrics.txt -r /src/contrib/lock/build.txt
COPY setup.py requirements.txt README.md LICENSE /src/
COPY contrib/dist/slim.py /src/contrib/dist/slim.py
COPY nodepass /src/nodepass
# Only byte code stays, and neither pip nor anything else that no run reads.
RUN /opt/nodepass/bin/pip install --no-deps --no-build-isolation --use-pep517 /src \
    && python3 /src/contrib/dist/slim.py /opt/nodepass/lib/python3.*/site-packages \
    && cd /opt/nodepass && rm -rf bin/pip* bin/*ctivate* bin/cffi* include share

FROM ${BASE}
COPY --from=build /opt/nodepass /opt/nodepass
# For the health check. /dev/shm is writable in every container, even with a read-only root file system.
ENV PATH=/opt/nodepass/bin:$PATH PYTHONDONTWRITEBYTECODE=1 METRICS_LISTEN=unix:/dev/shm/nodepass.sock
USER 65532:65532
# The program is process 1: it handles signals itself and starts no other process.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=5s --retries=3 CMD ["python", "-m", "nodepass.metrics.healthcheck"]
ENTRYPOINT ["nodepass"]
