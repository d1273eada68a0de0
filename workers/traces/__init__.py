"""Traces of OpenTelemetry: a job's submission, wait, run and result as spans, over all processes."""
