"""Programs for developers of this repository; none of them is installed."""
