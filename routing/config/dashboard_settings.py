"""The settings of what people look at: the dashboard, the audit of operators, the logs and the traces."""

from __future__ import annotations

from dataclasses import dataclass

from celery_capacity.routing.config import setting_values
from celery_capacity.routing.config.meaning import duration as _duration
from celery_capacity.routing.config.meaning import setting as _setting


@dataclass(frozen=True, repr=False)
class DashboardSettings:
    """Where the dashboard listens, who may read there and who may act, and what is logged, traced and kept."""

    dashboard: tuple[str, int] = _setting(
        "PLATFORM_DASHBOARD",
        "Where the dashboard listens.",
        setting_values.address,
        default=("127.0.0.1", 8000),
        unit="host:port",
        shown="127.0.0.1:8000",
    )
    token: str | None = _setting(
        "PLATFORM_TOKEN",
        "Token of operators, who read and act in the dashboard. It must have one to listen beyond this machine.",
        setting_values.token,
        unit="16 characters or more",
    )
    viewer_token: str | None = _setting(
        "PLATFORM_VIEWER_TOKEN",
        "Token of viewers, who read in the dashboard and cannot act. It needs a PLATFORM_TOKEN, and differs from it.",
        setting_values.token,
        unit="16 characters or more",
    )
    proxy_user_header: str | None = _setting(
        "PLATFORM_PROXY_USER_HEADER",
        "Header in which a reverse proxy before the dashboard names its user, such as X-Forwarded-User. The audit has"
        " this name. It gives no rights: an action needs the token of operators beside it.",
        setting_values.header_name,
        unit="name of a header",
        shown="none",
    )
    keep_audit: float = _duration(
        "PLATFORM_KEEP_AUDIT", 7_776_000.0, "How long the audit keeps the action of an operator; 0: for ever."
    )
    log_format: str = _setting(
        "PLATFORM_LOG_FORMAT",
        "Lines of the logs of workers, beat, the dashboard and `up`: text, or a JSON object each.",
        setting_values.log_format,
        default="text",
        unit="text or json",
    )
    keep_logs: int = _setting(
        "PLATFORM_KEEP_LOGS",
        "Newest lines of each job's own log that Postgres keeps, 10000 at the most; 0: none.",
        setting_values.kept_lines,
        default=0,
        unit="lines",
    )
    traces: bool = _setting(
        "PLATFORM_TRACES",
        "Make spans of jobs by OpenTelemetry, and carry their context in the messages. It needs the extra `otel`.",
        setting_values.traces,
        default=False,
        unit="on or off",
        shown="off",
    )
    worker_metrics: tuple[str, int] | None = _setting(
        "PLATFORM_WORKER_METRICS",
        "Where a worker serves its own metrics for Prometheus, at /metrics. Each worker needs an address of its own.",
        setting_values.address,
        unit="host:port",
    )
