"""Shows what happens: events, summaries, reports and live views."""
