# Images of Urza, Tamiyo and the trainer, all with torch.
#   docker build -f infra/images/services.Dockerfile --target urza -t esper-urza .
# TORCH replaces the pinned torch by another requirement, as in `make install`; that one is not checked by hash:
#   --build-arg TORCH="torch==2.9.1"
FROM python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d AS built
ARG TORCH=""
ENV PIP_ROOT_USER_ACTION=ignore UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never
WORKDIR /src
COPY requirements/uv.txt requirements/esper.txt requirements/torch.txt requirements/
RUN pip install --no-cache-dir --require-hashes -r requirements/uv.txt && uv venv /opt/esper
RUN if [ -n "$TORCH" ]; then uv pip install --no-cache --python /opt/esper "$TORCH"; \
    else uv pip install --no-cache --python /opt/esper --require-hashes -r requirements/torch.txt; fi
COPY infra/images/services.txt infra/images/
RUN uv pip install --no-cache --python /opt/esper --require-hashes -r infra/images/services.txt
COPY pyproject.toml README.md ./
COPY esper esper
COPY schemas schemas
COPY streams streams
COPY services services
COPY infra/migrations infra/migrations
RUN uv build --no-cache --wheel --build-constraints requirements/esper.txt --require-hashes \
 && uv pip install --no-cache --python /opt/esper --no-deps dist/*.whl

FROM python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d AS base
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/esper esper
COPY --from=built /opt/esper /opt/esper
ENV PATH=/opt/esper/bin:$PATH PYTHONUNBUFFERED=1 ESPER_STATE_DIR=/var/lib/esper/state
WORKDIR /var/lib/esper
USER 10001

FROM base AS urza
ENV ESPER_URZA__HOST=0.0.0.0 ESPER_URZA__PORT=8080 ESPER_URZA__METRICS_HOST=0.0.0.0 ESPER_URZA__METRICS_PORT=9102
EXPOSE 8080 9102
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:9102/healthz', timeout=4)"]
CMD ["esper", "serve", "urza"]

FROM base AS tamiyo
ENV ESPER_TAMIYO__METRICS_HOST=0.0.0.0 ESPER_TAMIYO__METRICS_PORT=9103
EXPOSE 9103
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:9103/healthz', timeout=4)"]
CMD ["esper", "serve", "tamiyo"]

FROM base AS trainer
ENV ESPER_TRAINER__LINK__METRICS_HOST=0.0.0.0 ESPER_TRAINER__LINK__METRICS_PORT=9104
RUN ["mkdir", "/var/lib/esper/runs"]
COPY configs/digits.yaml /etc/esper/digits.yaml
EXPOSE 9104
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:9104/healthz', timeout=4)"]
CMD ["esper", "train", "/etc/esper/digits.yaml"]
