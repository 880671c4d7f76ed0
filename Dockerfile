# Build:  docker build -t nodepass .
# Run:    docker run --rm --read-only -p 10101:10101 -p 8080:8080 -e DATA_PORT=tunnel nodepass "server://:10101/:8080?tls=1"
# More:   docs/containers.md
ARG PYTHON_VERSION=3.13

FROM python:${PYTHON_VERSION}-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/nodepass
# The dependencies first: this layer is rebuilt only when they change.
COPY contrib/lock /src/contrib/lock
RUN /opt/nodepass/bin/pip install --require-hashes -r /src/contrib/lock/metrics.txt -r /src/contrib/lock/build.txt
COPY setup.py requirements.txt README.md LICENSE /src/
COPY nodepass /src/nodepass
# Installing compiles the byte code, so the running container never writes any.
RUN /opt/nodepass/bin/pip install --no-deps --no-build-isolation /src && /opt/nodepass/bin/pip uninstall --yes setuptools pip

FROM python:${PYTHON_VERSION}-slim
COPY --from=build /opt/nodepass /opt/nodepass
# For the health check. /dev/shm is writable in every container, even with a read-only root file system.
ENV PATH=/opt/nodepass/bin:$PATH PYTHONDONTWRITEBYTECODE=1 METRICS_LISTEN=unix:/dev/shm/nodepass.sock
USER 65532:65532
# The program is process 1: it handles signals itself and starts no other process.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=5s --retries=3 CMD ["python", "-m", "nodepass.metrics.healthcheck"]
ENTRYPOINT ["nodepass"]
