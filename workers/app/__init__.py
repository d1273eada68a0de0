"""How an app becomes one of the platform."""
