# One image file for all of FlashRL; PART says which image it becomes:
#
#   docker build --build-arg PART=rollout-cpu .    the service on vLLM's CPU build
#   docker build --build-arg PART=rollout .        the service on CUDA
#   docker build --build-arg PART=trainer .        the trainer; --build-arg TORCH=cuda for GPUs
#
# Dependencies, in the exact versions of deploy/docker/constraints-*.txt, are a layer of their own: a changed source file
# rebuilds what comes after it, a few seconds and megabytes.

FROM python:3.11-slim-bookworm AS runtime
ARG PART
ARG TORCH=cpu
COPY deploy/docker/check_part.sh deploy/docker/system_packages.sh /build/
RUN sh /build/check_part.sh "$PART" "$TORCH" && sh /build/system_packages.sh "$PART"
# /runs: run folders. /cache: models and compiled kernels. /keys: one side's keys and token. /state: how the run ended.
RUN groupadd --gid 1000 flashrl \
    && useradd --uid 1000 --gid 1000 --home-dir /cache --no-create-home --shell /usr/sbin/nologin flashrl \
    && mkdir -p /runs /cache /keys/service /keys/trainer /state /prometheus \
    && chown -R flashrl:flashrl /runs /cache /keys /state /prometheus \
    && chmod 700 /keys/service /keys/trainer
COPY deploy/docker/constraints-*.txt deploy/docker/image-overrides.txt deploy/docker/install.sh deploy/docker/with_uv.sh \
    scripts/cpu-overrides.txt pyproject.toml /build/
WORKDIR /build
RUN sh with_uv.sh sh install.sh "$PART" "$TORCH"

FROM runtime AS package
COPY README.md LICENSE ./
COPY shared shared
COPY services services
COPY trainer trainer
# beside the environment, not in it: /opt/flashrl is the same for every state of the sources
RUN sh with_uv.sh /opt/uv/bin/uv pip install --quiet --no-cache --no-deps --compile-bytecode \
    --python /opt/flashrl/bin/python --target /opt/app .

FROM runtime
ARG PART
ENV FLASHRL_PART=$PART \
    PATH=/opt/app/bin:/opt/flashrl/bin:$PATH \
    PYTHONPATH=/opt/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/cache USER=flashrl \
    FLASHRL_TRAINER_RUN__DIR=/runs
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
