# Image of the stream worker, without torch. It also runs the commands that need no torch: esper migrate, topics, dlq,
# projections, why.
#   docker build -f infra/images/worker.Dockerfile -t esper-worker .
FROM python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d AS built
ENV PIP_ROOT_USER_ACTION=ignore UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never
WORKDIR /src
COPY requirements/uv.txt requirements/esper.txt requirements/
RUN pip install --no-cache-dir --require-hashes -r requirements/uv.txt && uv venv /opt/esper
COPY infra/images/worker.txt infra/images/
RUN uv pip install --no-cache --python /opt/esper --require-hashes -r infra/images/worker.txt
COPY pyproject.toml README.md ./
COPY esper esper
COPY schemas schemas
COPY streams streams
COPY services services
COPY infra/migrations infra/migrations
RUN uv build --no-cache --wheel --build-constraints requirements/esper.txt --require-hashes \
 && uv pip install --no-cache --python /opt/esper --no-deps dist/*.whl

FROM python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/esper esper
COPY --from=built /opt/esper /opt/esper
ENV PATH=/opt/esper/bin:$PATH PYTHONUNBUFFERED=1 ESPER_STATE_DIR=/var/lib/esper/state
ENV ESPER_STREAMS__METRICS_HOST=0.0.0.0 ESPER_STREAMS__METRICS_PORT=9101
WORKDIR /var/lib/esper
USER 10001
EXPOSE 9101
# /healthz, not /readyz: orchestrators restart unhealthy containers, which helps a hanging process but not one that waits
# for Postgres
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:9101/healthz', timeout=4)"]
CMD ["faust", "-A", "esper.streams", "worker", "--without-web"]
