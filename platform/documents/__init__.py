"""Models of the documents that commands print with `--json` and that the API answers with."""
