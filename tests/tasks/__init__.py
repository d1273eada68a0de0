"""Users' task modules: workers get them by PLATFORM_IMPORTS or -I, as a user's own are."""
