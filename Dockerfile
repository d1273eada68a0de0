# The image of every part of the platform; which part a container is, its command says: worker, beat, flower, dashboard,
# `db upgrade`. Tasks of your own: an image FROM this one, with your modules in /app (docs/how-to/compose.md).

FROM python:3.13-slim AS build
WORKDIR /src
COPY . .
# Without pip in it; Postgres and Redis are services of their own here, so the extra `embedded` is not installed.
RUN python -m venv --without-pip /opt/celery-capacity \
    && pip --python /opt/celery-capacity install --no-cache-dir .

FROM python:3.13-slim
COPY --from=build /opt/celery-capacity /opt/celery-capacity
# By its number, so that Kubernetes can tell that it is not root. /app is for tasks, /var/lib for what beat remembers.
RUN useradd --uid 10001 --user-group --home-dir /app --shell /usr/sbin/nologin platform \
    && install --directory --owner platform --group platform /app /var/lib/celery-capacity
ENV PATH=/opt/celery-capacity/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /app
ENTRYPOINT ["celery", "-A", "platform"]
CMD ["worker", "--loglevel", "INFO"]
