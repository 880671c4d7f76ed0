# Build:  docker build -t nodepass .
# Run:    docker run --rm --read-only --network host nodepass "server://:10101/:8080?tls=1"
ARG PYTHON_VERSION=3.13

FROM python:${PYTHON_VERSION}-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/nodepass
# The dependencies first: this layer is rebuilt only when they change.
COPY requirements.txt /src/
RUN /opt/nodepass/bin/pip install -r /src/requirements.txt
COPY setup.py README.md LICENSE /src/
COPY nodepass /src/nodepass
# Installing compiles the byte code too, so the running container never has to write any.
RUN /opt/nodepass/bin/pip install --no-deps /src && /opt/nodepass/bin/pip uninstall --yes pip

FROM python:${PYTHON_VERSION}-slim
COPY --from=build /opt/nodepass /opt/nodepass
ENV PATH=/opt/nodepass/bin:$PATH PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
STOPSIGNAL SIGTERM
ENTRYPOINT ["nodepass"]
