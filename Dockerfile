# The image of every part of the platform; which part a container is, its command says: worker, beat, flower, dashboard,
# `db upgrade`. Tasks of your own: an image FROM this one, with your modules in /app (docs/how-to/compose.md).

# To pin the base image by its digest: --build-arg PYTHON_IMAGE=python:3.13-slim@sha256:...
ARG PYTHON_IMAGE=python:3.13-slim

FROM ${PYTHON_IMAGE} AS build
# An index of your own, and, as the build secret `certificate`, the certificate that it is to be trusted by. Neither gets
# into the last stage.
ARG PIP_INDEX_URL
WORKDIR /src
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/*
# What the platform needs comes first, so that a changed line of its code downloads nothing anew. The environment has no
# pip in it. Postgres and Redis are services of their own here, so the extra `embedded` is not installed.
COPY deploy/requirements.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=certificate,target=/run/secrets/certificate \
    if [ -s /run/secrets/certificate ]; then export PIP_CERT=/run/secrets/certificate; fi \
    && python -m venv --without-pip /opt/celery-capacity \
    && pip --python /opt/celery-capacity install --require-hashes --requirement requirements.txt
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=certificate,target=/run/secrets/certificate \
    if [ -s /run/secrets/certificate ]; then export PIP_CERT=/run/secrets/certificate; fi \
    && pip --python /opt/celery-capacity install --no-deps .

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="celery-capacity" \
    org.opencontainers.image.description="Celery that starts a task only where its CPUs and memory are free" \
    org.opencontainers.image.licenses="BSD-3-Clause" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
# The base image has a pip of its own, which nothing here needs: a process that is broken into shall find no installer.
RUN python -c 'import ensurepip, os, pip, shutil; [shutil.rmtree(os.path.dirname(it.__file__)) for it in (ensurepip, pip)]' \
    && find /usr -path '*/bin/pip*' -delete
# By its number, so that Kubernetes can tell that it is not root. /app is for tasks, /var/lib for what outlives a
# container: the schedule of beat, and the locks of workers.
RUN useradd --uid 10001 --user-group --home-dir /app --shell /usr/sbin/nologin platform \
    && install --directory --owner platform --group platform /app /var/lib/celery-capacity
COPY --from=build /usr/bin/tini-static /usr/bin/tini
COPY --from=build /opt/celery-capacity /opt/celery-capacity
ENV PATH=/opt/celery-capacity/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /app
# tini hands signals on and buries the processes that tasks leave behind. -s: also where the engine adds an init of its own.
ENTRYPOINT ["tini", "-s", "--", "celery", "-A", "platform"]
CMD ["worker", "--loglevel", "INFO"]
