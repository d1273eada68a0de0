FROM python:3.13-slim

# Postgres and Redis are services of their own here, so the extra `embedded` is not installed.
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir . && rm -rf /src/* && useradd --create-home platform

USER platform
WORKDIR /home/platform
ENTRYPOINT ["celery", "-A", "platform"]
CMD ["worker", "--loglevel", "INFO"]
