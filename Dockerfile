# The server in an image:
#
#     docker build -t gramophone .                            # CPU
#     docker build --build-arg DEVICE=cuda -t gramophone .    # with the CUDA kernels; `make image DEVICE=cuda`
#
# Neither build needs a GPU: the cuda image has the kernels for all targets of setup.py. Both are large, because torch's
# ordinary wheel brings the CUDA libraries.
ARG DEVICE=cpu

# Builder: a compiler and the Makefile's own verbs, the same that CI runs ----------------------------------------------

FROM python:3.12-slim AS builder-cpu
ENV GRAMOPHONE_CUDA=0
RUN apt-get update && apt-get install -y --no-install-recommends g++ make && rm -rf /var/lib/apt/lists/*

# The toolkit is of the major version that torch in constraints.txt is built with. 1: no image without the kernels.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS builder-cuda
ENV GRAMOPHONE_CUDA=1
RUN apt-get update && apt-get install -y --no-install-recommends g++ make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM builder-${DEVICE} AS builder
WORKDIR /opt/gramophone
COPY . .
# The pinned packages of constraints.txt, without the development tools; the cache (BuildKit's) keeps torch from being
# downloaded again after each change. Then the wheel takes the place of the editable install, which would need the sources.
RUN --mount=type=cache,target=/root/.cache/pip make wheel EXTRAS=server
RUN .venv/bin/python -m pip install --no-deps --force-reinstall dist/gramophone-*.whl

# Runtime: the virtual environment, at the same path and with the same Python, and nothing else ------------------------

FROM python:3.12-slim AS runtime-cpu

# "base" has what lets the driver in; CUDA's libraries are in torch's wheels.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04 AS runtime-cuda
RUN apt-get update && apt-get install -y --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*

FROM runtime-${DEVICE}
# A number for USER, so that Kubernetes can see that it is not root; a home, for weights that torchvision downloads.
RUN useradd --uid 10001 --create-home gramophone
COPY --from=builder /opt/gramophone/.venv /opt/gramophone/.venv
COPY LICENSE deploy/health.py /opt/gramophone/
# The server binds loopback unless told otherwise, which nobody outside the container would reach.
ENV PATH=/opt/gramophone/.venv/bin:$PATH GRAMOPHONE_HOST=0.0.0.0 GRAMOPHONE_PORT=50051 GRAMOPHONE_METRICS_PORT=9464
USER 10001
WORKDIR /home/gramophone
EXPOSE 50051 9464
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s CMD ["python", "/opt/gramophone/health.py"]
# No shell in between, so that SIGTERM reaches the server, which lets running jobs end. Flags of the server may follow.
ENTRYPOINT ["gramophone-server"]
