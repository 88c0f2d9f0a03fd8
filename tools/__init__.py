"""Programs for those who work on the repository; nothing here is installed."""
