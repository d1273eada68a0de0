"""Statements on the durable rows in Postgres: one file for each group."""
