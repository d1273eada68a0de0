"""A program that sends signed tasks from its own process, since Celery sets signing up for the whole process.

`python -m tests.tasks.signing FOLDER ours:2 plain:1 ...` uses the key of that folder. Each further word names an app
and a protocol: an app on the platform or a plain app. The program prints the ids of the tasks, a line each.
"""

from __future__ import annotations

import os
import sys

from celery import Celery

from celery_capacity import install

if __name__ == "__main__":
    folder, *ways = sys.argv[1:]
    for way in ways:
        how, protocol = way.split(":")
        app = Celery("signing", broker=os.environ["REDIS_URL"], set_as_current=False)
        app.conf.update(
            security_key=f"{folder}/key.pem",
            security_certificate=f"{folder}/cert.crt",
            security_cert_store=f"{folder}/*.crt",
            task_serializer="auth",
            accept_content=["auth"],
            task_protocol=int(protocol),
        )
        if how == "ours":
            install(app)
        app.setup_security()
        print(app.send_task("tests.fixtures.tasks.add", [40, 2]).id)
