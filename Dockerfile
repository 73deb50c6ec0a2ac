# A container image of the server:
#
#     docker build -t gramophone .                            # CPU
#     docker build --build-arg DEVICE=cuda -t gramophone .    # with the CUDA kernels; `make image DEVICE=cuda`
#
# Neither build needs a GPU: the cuda image has the kernels for all targets of setup.py. Both images are large, because
# torch's ordinary wheel depends on the CUDA libraries.
ARG DEVICE=cpu

# Builder: a compiler and the Makefile's targets, which CI runs too -----------------------------------------------------

FROM python:3.12-slim AS builder-cpu
ENV GRAMOPHONE_CUDA=0
RUN apt-get update && apt-get install -y --no-install-recommends g++ make && rm -rf /var/lib/apt/lists/*

# The toolkit has the same major version as the torch of constraints.txt. With 1 the build fails if the kernels cannot be
# compiled.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS builder-cuda
ENV GRAMOPHONE_CUDA=1
RUN apt-get update && apt-get install -y --no-install-recommends g++ make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM builder-${DEVICE} AS builder
WORKDIR /opt/gramophone
COPY . .
# Installs the pinned packages of constraints.txt, without the development tools. BuildKit's cache avoids downloading torch
# again after each change. The wheel then replaces the editable install, which would need the sources.
RUN --mount=type=cache,target=/root/.cache/pip make wheel EXTRAS=server
RUN .venv/bin/python -m pip install --no-deps --force-reinstall dist/gramophone-*.whl

# Runtime: only the virtual environment, at the same path and with the same Python --------------------------------------

FROM python:3.12-slim AS runtime-cpu

# "base" has what the host's driver needs; CUDA's libraries are in torch's wheels.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04 AS runtime-cuda
RUN apt-get update && apt-get install -y --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*

FROM runtime-${DEVICE}
# USER is a number, so that Kubernetes can verify that it is not root. The home folder is for weights that torchvision
# downloads.
RUN useradd --uid 10001 --create-home gramophone
COPY --from=builder /opt/gramophone/.venv /opt/gramophone/.venv
COPY LICENSE deploy/health.py /opt/gramophone/
# By default the server listens on loopback, which cannot be reached from outside the container.
ENV PATH=/opt/gramophone/.venv/bin:$PATH GRAMOPHONE_HOST=0.0.0.0 GRAMOPHONE_PORT=50051 GRAMOPHONE_METRICS_PORT=9464
USER 10001
WORKDIR /home/gramophone
EXPOSE 50051 9464
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s CMD ["python", "/opt/gramophone/health.py"]
# No shell in between, so that SIGTERM reaches the server, which then drains. Flags of the server can follow.
ENTRYPOINT ["gramophone-server"]
