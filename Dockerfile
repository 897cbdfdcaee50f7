# One image file for all of FlashRL; PART says which image it becomes:
#
#   docker build --build-arg PART=rollout-cpu .    the service on vLLM's CPU build
#   docker build --build-arg PART=rollout .        the service on CUDA
#   docker build --build-arg PART=trainer .        the trainer; --build-arg TORCH=cuda for GPUs
#
# Dependencies, in the exact versions of deploy/docker/constraints-*.txt, are layers of their own: a changed source
# file rebuilds the last two, a few seconds and megabytes.

FROM python:3.11-slim-bookworm AS dependencies
ARG PART
ARG TORCH=cpu
COPY deploy/docker/check_part.sh /tmp/
RUN sh /tmp/check_part.sh "$PART" "$TORCH"
ARG UV_VERSION=0.13.9
RUN python -m venv --without-pip /opt/flashrl \
    && python -m venv /opt/uv \
    && /opt/uv/bin/pip install --no-cache-dir --disable-pip-version-check --quiet "uv==$UV_VERSION"
WORKDIR /build
COPY deploy/docker/constraints-*.txt deploy/docker/image-overrides.txt deploy/docker/install.sh scripts/cpu-overrides.txt pyproject.toml ./
RUN sh install.sh "$PART" "$TORCH"

FROM dependencies AS package
COPY README.md LICENSE ./
COPY shared shared
COPY services services
COPY trainer trainer
# beside the environment, not in it: /opt/flashrl is the same for every state of the sources
RUN /opt/uv/bin/uv pip install --quiet --no-cache --no-deps --compile-bytecode \
    --python /opt/flashrl/bin/python --target /opt/app .

FROM python:3.11-slim-bookworm
ARG PART
COPY deploy/docker/system_packages.sh /tmp/
RUN sh /tmp/system_packages.sh "$PART"
# /runs: run folders. /cache: models and compiled kernels. /keys: one side's keys and token. /state: how the run ended.
RUN groupadd --gid 1000 flashrl \
    && useradd --uid 1000 --gid 1000 --home-dir /cache --no-create-home --shell /usr/sbin/nologin flashrl \
    && mkdir -p /runs /cache /keys/service /keys/trainer /state /prometheus \
    && chown -R flashrl:flashrl /runs /cache /keys /state /prometheus \
    && chmod 700 /keys/service /keys/trainer
ENV FLASHRL_PART=$PART \
    PATH=/opt/app/bin:/opt/flashrl/bin:$PATH \
    PYTHONPATH=/opt/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/cache USER=flashrl \
    FLASHRL_TRAINER_RUN__DIR=/runs
COPY --from=dependencies /opt/flashrl /opt/flashrl
WORKDIR /app
COPY examples/tiny_arith/model examples/tiny_arith/model
COPY examples/tiny_arith/data examples/tiny_arith/data
COPY configs configs
COPY deploy/docker/*.py /opt/flashrl-docker/
COPY --from=package /opt/app /opt/app
USER 1000:1000
EXPOSE 8000 8001 9100
HEALTHCHECK --interval=5s --timeout=5s --start-period=30m --retries=6 \
    CMD ["python", "-S", "/opt/flashrl-docker/health.py"]
CMD ["python", "/opt/flashrl-docker/start.py"]
