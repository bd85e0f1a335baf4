# The worker's image: docs/deploy.md says how to build, check and extend it.
#
#   docker build -t cvworker .                                             NVIDIA GPUs (and CPUs)
#   docker build -t cvworker:cpu --build-arg TORCH_INDEX=https://... .     CPUs only, without NVIDIA's gigabytes
#   docker build -t cvworker:compiler --target compiler .                  with what torch.compile needs
#
# constraints.txt was taken with this Python. The CUDA libraries come as wheels: the host brings only the driver.
ARG PYTHON=3.11.14-slim-trixie

# ---- what to install: a stage of its own, so that a change elsewhere in pyproject.toml installs nothing anew
FROM python:${PYTHON} AS requirements
# Extras of pyproject.toml to install too, such as "onnx otel".
ARG EXTRAS=""
WORKDIR /build
COPY pyproject.toml ./
# hadolint ignore=SC2086 # the names are words of their own
RUN python -c "import sys, tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *(r for extra in sys.argv[1:] for r in p['optional-dependencies'][extra]), sep='\n')" ${EXTRAS} > requirements.txt

# ---- the dependencies: gigabytes that change seldom
FROM python:${PYTHON} AS dependencies
# An index of CPU-only builds of torch and torchvision, asked for these two only; empty: the usual (CUDA) builds.
ARG TORCH_INDEX=""
WORKDIR /build
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY constraints.txt ./
COPY --from=requirements /build/requirements.txt ./
# Wheels only: nothing is compiled here, so nothing that compiles is needed.
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ -n "${TORCH_INDEX}" ]; then \
        pip install --no-deps --index-url "${TORCH_INDEX}" --constraint constraints.txt torch torchvision; \
    fi && \
    pip install --only-binary :all: --constraint constraints.txt --requirement requirements.txt

# ---- the code, as a wheel
FROM python:${PYTHON} AS wheel
WORKDIR /build
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt setuptools
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

# ---- the worker
FROM python:${PYTHON} AS worker
# tini passes SIGTERM on and reaps what DataLoader processes leave behind: process 1 of a container has to.
# hadolint ignore=DL3008 # Debian takes superseded versions away; the base image's tag names the release
RUN apt-get update && \
    apt-get install --yes --no-install-recommends tini && \
    rm -rf /var/lib/apt/lists/* && \
    groupadd --gid 10001 cvworker && \
    useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/cache/cvworker --shell /usr/sbin/nologin cvworker && \
    install --directory --owner=10001 --group=10001 /var/cache/cvworker
COPY --from=dependencies /opt/venv /opt/venv
# A layer of its own, and a small one: with unchanged dependencies it is all that a push sends.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    /opt/venv/bin/pip install --no-cache-dir --no-deps --no-index /wheels/*.whl

# The NVIDIA runtime reads the first two: every GPU that the container was given, for computing and nvidia-smi.
# Weights, and what torch.compile makes, go to the one cache that is a volume.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/cache/cvworker \
    XDG_CACHE_HOME=/var/cache/cvworker \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/cvworker/torchinductor \
    TRITON_CACHE_DIR=/var/cache/cvworker/triton \
    CVWORKER_HTTP_HOST=0.0.0.0 \
    CVWORKER_LOG_FORMAT=json

ARG VERSION=""
ARG REVISION=""
LABEL org.opencontainers.image.title="cvworker" \
      org.opencontainers.image.description="A queue-driven batch worker for computer vision: SQS in, PyTorch in the middle, HTTP callbacks out." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# All that is ever written to: with these two, `docker run --read-only` needs no more flags.
VOLUME ["/tmp", "/var/cache/cvworker"]
WORKDIR /app
# In numbers, or Kubernetes could not tell that it is not root.
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --start-period=300s --interval=30s --timeout=10s --retries=3 CMD ["cvworker", "healthcheck"]
ENTRYPOINT ["tini", "--", "cvworker"]
CMD ["run"]

# ---- with a C++ compiler: what `--optimize full` (torch.compile) needs, on GPUs as well. It is not in the image above,
# where that setting falls back with one log line: what decodes strangers' files is better off without one.
FROM worker AS compiler
USER 0:0
# hadolint ignore=DL3008 # as above
RUN apt-get update && \
    apt-get install --yes --no-install-recommends g++ && \
    rm -rf /var/lib/apt/lists/*
USER 10001:10001

# ---- what is built where no --target is given
FROM worker AS default
