"""Settings, and what they name: URLs, files, this machine."""
