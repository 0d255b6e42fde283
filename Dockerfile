# The image of web and worker. Versions and hashes come from infra/lock.
# To pin the base as well: --build-arg BASE=python:3.11-slim-bookworm@sha256:… (the digest you have checked).
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS builder
WORKDIR /src
COPY infra/lock/build.txt infra/lock/runtime.txt infra/lock/
RUN python -m venv /opt/build \
    && /opt/build/bin/pip install --no-cache-dir --only-binary=:all: --require-hashes -r infra/lock/build.txt \
    && python -m venv --without-pip /opt/receiver \
    && /opt/build/bin/pip --python /opt/receiver/bin/python install \
        --no-cache-dir --only-binary=:all: --require-hashes -r infra/lock/runtime.txt
COPY pyproject.toml README.md ./
COPY storage storage
COPY receiver receiver
RUN /opt/build/bin/hatchling build -t wheel -d /wheels \
    && /opt/build/bin/pip --python /opt/receiver/bin/python install --no-cache-dir --no-deps --no-index /wheels/*.whl

FROM ${BASE}
LABEL org.opencontainers.image.title="kling-receiver" \
      org.opencontainers.image.description="Ask an image model, never lose its callback, archive every picture." \
      org.opencontainers.image.base.name="python:3.11-slim-bookworm"
# The user's number is fixed, so that secret files and volumes can be given to it. Nothing here installs packages.
RUN groupadd --gid 10001 receiver \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin receiver \
    && install -d -o 10001 -g 10001 -m 0700 /data /data/spool \
    && python -m pip uninstall --yes --no-cache-dir pip setuptools wheel
COPY --from=builder /opt/receiver /opt/receiver
ENV PATH=/opt/receiver/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    RECEIVER_SPOOL_DIR=/data/spool
# The only place that is written to: the default SQLite file, and downloads on their way.
WORKDIR /data
VOLUME /data
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import http.client, os; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('RECEIVER_PORT', '8000')), timeout=3); c.request('GET', '/healthz'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["receiver"]
CMD ["serve", "--host", "0.0.0.0"]
